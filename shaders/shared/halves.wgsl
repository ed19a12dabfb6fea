// Columns of a product that an epilogue needs two at a time. With HALVES = 2 they form groups of 2 HALF columns, and the
// column c of a group's first half is stored together with c + HALF. So a tile alternates strips of STRIP columns of
// first halves with strips of the second halves that belong to them. With HALVES = 1 columns are as they are.
//
// HALVES, HALF: host constants. The importing module has STRIP.

// Columns that an epilogue gets at a time, and as many that belong to them.
const COLUMNS: u32 = 4u * WIDE;

// The column of C that column c of the tiles is. What lies past the end of C stays past it.
fn column_of(c: u32) -> u32 {
    if (HALVES == 1u) {
        return c;
    }
    let first = c / (2u * STRIP) * STRIP + c % STRIP;
    return first / HALF * 2u * HALF + first % HALF + c / STRIP % 2u * HALF;
}

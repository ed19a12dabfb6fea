// Inclusive prefix sum over a workgroup of 256 invocations; the total is in scan_memory[255] afterwards.

var<workgroup> scan_memory: array<u32, 256>;

fn inclusive_scan(value: u32, invocation: u32) -> u32 {
    var sum = value;
    workgroupBarrier();
    scan_memory[invocation] = sum;
    workgroupBarrier();
    for (var distance = 1u; distance < 256u; distance <<= 1u) {
        var other = 0u;
        if (invocation >= distance) {
            other = scan_memory[invocation - distance];
        }
        workgroupBarrier();
        sum += other;
        scan_memory[invocation] = sum;
        workgroupBarrier();
    }
    return sum;
}

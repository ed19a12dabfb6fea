// shared/branch_subgroup where barriers of a subgroup wait for the whole workgroup, as llvmpipe's do: all subgroups take a
// branch together, which to those that would not is work without effect. To be called in uniform control flow.

var<workgroup> branch_wanted: atomic<u32>;

fn takes_branch(all_want: bool, wanted: bool) -> bool {
    atomicStore(&branch_wanted, 0u);
    workgroupBarrier();
    if (all_want || wanted) {
        atomicStore(&branch_wanted, 1u);
    }
    workgroupBarrier();
    let takes = atomicLoad(&branch_wanted) != 0u;
    workgroupBarrier();
    return takes;
}

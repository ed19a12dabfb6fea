// Branches with barriers of a subgroup in them, which a subgroup takes by itself. shared/branch_workgroup has the same
// function for drivers whose subgroups cannot.

// Whether the subgroup takes a branch: whether all want to, which is one value in the subgroup, or any of its invocations.
fn takes_branch(all_want: bool, wanted: bool) -> bool {
    return all_want || subgroupAny(wanted);
}

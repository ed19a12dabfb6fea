// Branches with barriers of a subgroup in them, which a subgroup takes by itself. shared/branch_workgroup has the same
// function for drivers whose subgroups cannot.

// Whether the subgroup takes a branch: whether any of its invocations wants to.
fn takes_branch(wanted: bool) -> bool {
    return subgroupAny(wanted);
}

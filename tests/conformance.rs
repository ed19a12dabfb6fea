//! The checks of `examples/conformance` on every device.

mod support;

use support::checks::{assert_all_pass, table};

#[test]
fn every_check_passes_on_every_device() {
    assert_all_pass(&table());
}

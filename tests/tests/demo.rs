// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The README's first command, so that it works exactly as written.

use anyhow::Result;
use vssd_tests::serial::guest_slot;

#[test]
fn the_demonstration_holds() -> Result<()> {
    let _slot = guest_slot()?;
    vssd_tests::demo::shrink::run()
}

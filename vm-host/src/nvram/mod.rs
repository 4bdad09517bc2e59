// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Regions of NV-RAM: where the memory of persistent VMs lies.

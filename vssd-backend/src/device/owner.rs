//! Placeholder: replaced by the owner.

//! The scenarios of lmrun: harness, workloads, soaks and benches.

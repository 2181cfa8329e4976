//! Registers, restartable sequences, robust locks.

runtime_tests::carried! {
    registers_general, registers_avx, registers_avx512, registers_fpu,
    rseq_registered, rseq_section, robust_lock, robust_lock_shared,
}

//! Memory of every kind.

runtime_tests::carried! {
    memory_private, memory_large, memory_shared, memory_shared_parts, memory_heap, memory_stack, memory_guards, memory_prot_none,
    memory_holes, memory_cow, memory_code, memory_vdso, memory_many, memory_advice, memory_fork_advice,
    mapped_private, mapped_shared, mapped_read_only, mapped_odd_size, mapped_dev_zero, sysv_shm, sysv_removed, sysv_idle,
}

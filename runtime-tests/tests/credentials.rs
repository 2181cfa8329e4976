//! Credentials, limits, seccomp filters.

runtime_tests::carried! {
    credentials, credentials_capabilities, credentials_threads, credentials_no_new_privs, credentials_dumpable,
    seccomp, seccomp_stacked, seccomp_threads, seccomp_tight, seccomp_user,
    limits, limits_oom_score, priorities, affinity, prctl_values, subreaper, parent_death_signal,
}

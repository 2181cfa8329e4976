//! Trees of processes, threads, identities.

runtime_tests::carried! {
    stay: identity, identity_title, identity_exec;
    tree, tree_sessions, tree_orphans, tree_wide, zombies, zombie_leaders,
    threads, threads_hundred, threads_of_child, threads_join, threads_local, threads_born_later,
    places,
}

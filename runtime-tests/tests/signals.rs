//! Signals, and system calls that a checkpoint interrupts.

runtime_tests::carried! {
    signal_actions, signal_masks, signal_stacks, signal_in_handler, signal_pending, signal_pending_thread,
    signal_pending_member, signal_stopped,
    blocked_sleeps, blocked_polls, blocked_futexes, blocked_signals, blocked_for_good, blocked_io, blocked_wait,
}

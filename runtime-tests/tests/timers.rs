//! Timers and clocks.

runtime_tests::carried! {
    timer_interval, timer_posix, timer_posix_delivers, timer_posix_overrun, timerfd, timerfd_rings, clocks,
}

//! Open files of every kind that is not a socket.

runtime_tests::carried! {
    stay: inotify_watches, stdio_null;
    file_offsets, file_flags, file_sharing, file_numbers, file_owner, file_append, directory, directory_as_place,
    devices, pipe_content, pipe_full, pipe_size, pipe_packets, pipe_closed_ends, pipe_between, pipe_reopened,
    deleted_open, deleted_shared, deleted_mapped, deleted_name_taken, inotify_numbers, lock_flock, lock_posix, lock_description, eventfd, signalfd, epoll, epoll_modes, epoll_nested, tmpfs, tmpfs_in_use,
}

//! Address spaces: the mm, its mappings, and where their pages are.

/// An asynchronous I/O context (io_setup(2)).
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct AioRingEntry {
    #[prost(uint64, required, tag = "1")]
    pub id: u64,
    #[prost(uint32, required, tag = "2")]
    pub nr_req: u32,
    #[prost(uint32, required, tag = "3")]
    pub ring_len: u32,
}

/// `mm-PID.img`: an address space (PR_SET_MM_MAP) and its mappings.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct MmEntry {
    #[prost(uint64, required, tag = "1")]
    pub mm_start_code: u64,
    #[prost(uint64, required, tag = "2")]
    pub mm_end_code: u64,
    #[prost(uint64, required, tag = "3")]
    pub mm_start_data: u64,
    #[prost(uint64, required, tag = "4")]
    pub mm_end_data: u64,
    #[prost(uint64, required, tag = "5")]
    pub mm_start_stack: u64,
    #[prost(uint64, required, tag = "6")]
    pub mm_start_brk: u64,
    #[prost(uint64, required, tag = "7")]
    pub mm_brk: u64,
    #[prost(uint64, required, tag = "8")]
    pub mm_arg_start: u64,
    #[prost(uint64, required, tag = "9")]
    pub mm_arg_end: u64,
    #[prost(uint64, required, tag = "10")]
    pub mm_env_start: u64,
    #[prost(uint64, required, tag = "11")]
    pub mm_env_end: u64,
    /// Id of the [`RegFileEntry`](super::files::RegFileEntry) of the executable.
    #[prost(uint32, required, tag = "12")]
    pub exe_file_id: u32,
    #[prost(uint64, repeated, packed = "false", tag = "13")]
    pub mm_saved_auxv: Vec<u64>,
    #[prost(message, repeated, tag = "14")]
    pub vmas: Vec<VmaEntry>,
    /// PR_GET_DUMPABLE.
    #[prost(int32, optional, tag = "15")]
    pub dumpable: Option<i32>,
    #[prost(message, repeated, tag = "16")]
    pub aios: Vec<AioRingEntry>,
    #[prost(bool, optional, tag = "17")]
    pub thp_disabled: Option<bool>,
}

/// A mapping.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Offset in the file, in bytes.
    #[prost(uint64, required, tag = "3")]
    pub pgoff: u64,
    /// Id of the open file (files) or of the shared memory.
    #[prost(uint64, required, tag = "4")]
    pub shmid: u64,
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// Kind of mapping: see [`vma_status`].
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
    /// -1; a file of a restore in progress.
    #[prost(sint64, required, tag = "8")]
    pub fd: i64,
    /// Bit MADV_x is set where advice x was given.
    #[prost(uint64, optional, tag = "9")]
    pub madv: Option<u64>,
    /// Open flags of the mapped file.
    #[prost(uint32, optional, tag = "10")]
    pub fdflags: Option<u32>,
}

/// First record of a pagemap: where the pages are.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct PagemapHead {
    /// N of `pages-N.img`.
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// A run of pages in a pagemap.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// Number of pages, saturating; for readers that do not know `nr_pages`.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    /// How old images say PE_PARENT.
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    /// PE_*: see [`pe`].
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// Number of pages; it counts where it is there.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}

/// Bits of [`PagemapEntry::flags`].
pub mod pe {
    /// The content is in the parent image.
    pub const PARENT: u32 = 1 << 0;
    /// The page may be fetched later (post-copy).
    pub const LAZY: u32 = 1 << 1;
    /// The content is in this image's pages file.
    pub const PRESENT: u32 = 1 << 2;
    /// All that are known.
    pub const ALL: u32 = PARENT | LAZY | PRESENT;
}

/// Bits of [`VmaEntry::status`]. A mapping has [`REGULAR`](vma_status::REGULAR) and what describes it.
pub mod vma_status {
    pub const REGULAR: u32 = 1 << 0;
    pub const STACK: u32 = 1 << 1;
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const HEAP: u32 = 1 << 5;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const FILE_SHARED: u32 = 1 << 7;
    pub const ANON_SHARED: u32 = 1 << 8;
    pub const ANON_PRIVATE: u32 = 1 << 9;
    pub const SYSVIPC: u32 = 1 << 10;
    pub const SOCKET: u32 = 1 << 11;
    pub const VVAR: u32 = 1 << 12;
    pub const AIORING: u32 = 1 << 13;
    pub const MEMFD: u32 = 1 << 14;
    pub const SHADOW_STACK: u32 = 1 << 15;
    pub const GUARD: u32 = 1 << 16;
    pub const UPROBES: u32 = 1 << 17;
}

//! What a checkpoint is and whom it holds: inventory, process tree, cpu.

use super::core::TaskKobjIdsEntry;

/// Security modules with per-task labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub enum LsmType {
    NoLsm = 0,
    Selinux = 1,
    Apparmor = 2,
}

/// Plugins that the dump was made with.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct PluginsEntry {
    #[prost(string, repeated, tag = "12")]
    pub plugins: Vec<String>,
}

/// `inventory.img`: what the other images are.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct InventoryEntry {
    /// See [`IMG_VERSION`].
    #[prost(uint32, required, tag = "1")]
    pub img_version: u32,
    /// `fdinfo-` is named by `files_id`, not by pid.
    #[prost(bool, optional, tag = "2")]
    pub fdinfo_per_id: Option<bool>,
    /// The namespaces that the dumping tool itself was in.
    #[prost(message, optional, tag = "3")]
    pub root_ids: Option<TaskKobjIdsEntry>,
    /// Namespace images are named by namespace id.
    #[prost(bool, optional, tag = "4")]
    pub ns_per_id: Option<bool>,
    /// The set of the dumping tool itself.
    #[prost(uint32, optional, tag = "5")]
    pub root_cg_set: Option<u32>,
    #[prost(enumeration = "LsmType", optional, tag = "6")]
    pub lsmtype: Option<i32>,
    /// Microseconds since boot.
    #[prost(uint64, optional, tag = "8")]
    pub dump_uptime: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pub pre_dump_mode: Option<u32>,
    #[prost(bool, optional, tag = "10")]
    pub tcp_close: Option<bool>,
    #[prost(uint32, optional, tag = "11")]
    pub network_lock_method: Option<u32>,
    #[prost(message, optional, tag = "12")]
    pub plugins_entry: Option<PluginsEntry>,
    #[prost(string, optional, tag = "13")]
    pub dump_criu_run_id: Option<String>,
    #[prost(bool, optional, tag = "14")]
    pub allow_uprobes: Option<bool>,
}

/// `pstree.img`: a process; parents come before children.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct PstreeEntry {
    /// In the container's pid namespace; so are all the others.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// 0 for the root.
    #[prost(uint32, required, tag = "2")]
    pub ppid: u32,
    #[prost(uint32, required, tag = "3")]
    pub pgid: u32,
    #[prost(uint32, required, tag = "4")]
    pub sid: u32,
    /// Tids, the leader's first.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// Who made the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub enum CpuVendor {
    Unknown = 0,
    Intel = 1,
    Amd = 2,
}

/// The processor that the dump was taken on.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct CpuinfoX86Entry {
    #[prost(enumeration = "CpuVendor", required, tag = "1")]
    pub vendor_id: i32,
    #[prost(uint32, required, tag = "2")]
    pub cpu_family: u32,
    #[prost(uint32, required, tag = "3")]
    pub model: u32,
    #[prost(uint32, required, tag = "4")]
    pub stepping: u32,
    #[prost(uint32, required, tag = "5")]
    pub capability_ver: u32,
    #[prost(uint32, repeated, packed = "false", tag = "6")]
    pub capability: Vec<u32>,
    #[prost(string, optional, tag = "7")]
    pub model_id: Option<String>,
    #[prost(uint64, optional, tag = "8")]
    pub xfeatures_mask: Option<u64>,
    #[prost(uint32, optional, tag = "9")]
    pub xsave_size: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    pub xsave_size_max: Option<u32>,
}

/// `cpuinfo.img`.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct CpuinfoEntry {
    #[prost(message, repeated, tag = "1")]
    pub x86_entry: Vec<CpuinfoX86Entry>,
}

/// [`InventoryEntry::img_version`] of images whose files start with two magic numbers (since CRIU 2.0).
pub const IMG_VERSION: u32 = 2;

//! Changing the limits of a running container.
//!
//! What is zero, empty or missing stays as it is. Files are looked for by their names in all hierarchies that the container is
//! in, so that hybrid hosts need no case of their own. Where a write fails, those before it are taken back.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxIntelRdt, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::cgroup::Cgroup;
use super::cgroup_files::CgroupFiles;
use super::rdt::{self, Group};
use super::state::{State, Status, Store};
use super::{Error, Result, status};

/// Intel's cache and memory-bandwidth allocation: lines of `schemata`.
#[derive(Debug, Clone, Default)]
pub struct Schemata {
    pub l3_cache: Option<String>,
    pub memory_bandwidth: Option<String>,
}

/// Applies what `resources` and `schemata` say to container `id`.
///
/// # Errors
/// [`Error::NotRunning`], [`Error::NoController`] for a limit that this host has no controller for, or the kernel's
/// answer.
pub fn update(store: &Store, id: &str, resources: &LinuxResources, schemata: &Schemata) -> Result<()> {
    let state = store.load(id)?;
    if !matches!(status(&state), Status::Created | Status::Running | Status::Paused) {
        return Err(Error::NotRunning);
    }
    let mut limits = Limits { files: CgroupFiles::of(&state.cgroup)?, before: Vec::new() };
    let set = limits.set_all(resources).and_then(|()| set_schemata(store, &state, schemata));
    // systemd writes its own again whenever it likes.
    let set = set.and_then(|()| state.unit.as_ref().map_or(Ok(()), |unit| unit.update(resources)));
    if set.is_err() {
        limits.take_back();
    }
    set
}

/// Sets the limits of a cgroup that has just been made.
///
/// # Errors
/// [`Error::NoController`], or the kernel's answer.
pub(super) fn limit(cgroup: &Path, resources: &LinuxResources) -> Result<()> {
    let mut limits = Limits { files: CgroupFiles::of(cgroup)?, before: Vec::new() };
    limits.set_all(resources)?;
    let network = resources.network().as_ref();
    if let Some(class) = network.and_then(|network| network.class_id()) {
        limits.set(&["net_cls.classid"], &class.to_string())?;
    }
    for priority in network.and_then(|network| network.priorities().as_ref()).into_iter().flatten() {
        limits.set(&["net_prio.ifpriomap"], &format!("{} {}", priority.name(), priority.priority()))?;
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let number = |n: Option<u32>| n.map_or("max".to_owned(), |n| n.to_string());
        let (handles, objects) = (number(limit.hca_handles()), number(limit.hca_objects()));
        limits.set(&["rdma.max"], &format!("{device} hca_handle={handles} hca_object={objects}"))?;
    }
    Ok(())
}

/// The files of a container's cgroups.
struct Limits {
    files: CgroupFiles,
    /// What was written over, in order.
    before: Vec<(PathBuf, String)>,
}

impl Limits {
    fn set_all(&mut self, resources: &LinuxResources) -> Result<()> {
        if let Some(memory) = resources.memory() {
            self.memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self.cpu(cpu)?;
        }
        if let Some(pids) = resources.pids().filter(|pids| pids.limit() != 0) {
            self.set(&["pids.max"], &or_max(pids.limit()))?;
        }
        if let Some(block_io) = resources.block_io() {
            self.block_io(block_io)?;
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            let size = limit.page_size();
            let names = [format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.max")];
            self.set(&names.each_ref().map(String::as_str), &limit.limit().to_string())?;
        }
        for (name, value) in resources.unified().iter().flatten() {
            if name.contains('/') || name.starts_with('.') {
                return Err(Error::NoController(name.clone()));
            }
            self.set(&[name], value)?;
        }
        Ok(())
    }

    /// The kernel wants memory plus swap to be no less than memory at every moment.
    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        let limit = memory.limit().unwrap_or(0);
        // Without a limit on memory there is none on memory plus swap.
        let swap = match memory.swap().unwrap_or(0) {
            0 if limit == -1 => -1,
            swap => swap,
        };
        if self.find(&["memory.max"]).is_some() {
            self.memory_version2(memory, limit, swap)?;
        } else if let Some(file) = self.find(&["memory.limit_in_bytes"]) {
            let mut writes = vec![("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", swap)];
            writes.retain(|(name, value)| *value != 0 && (limit != -1 || swap != -1 || self.find(&[name]).is_some()));
            let now: i64 = read(&file).parse().unwrap_or(i64::MAX);
            if swap == -1 || now < swap {
                writes.reverse();
            }
            for (name, value) in writes {
                self.set(&[name], &value.to_string()).map_err(|error| self.memory_in_use(error, limit))?;
            }
        } else if limit != 0 || swap != 0 {
            return Err(Error::NoController("memory".into()));
        }
        let reservation = memory.reservation().unwrap_or(0);
        if reservation != 0 {
            let value =
                if self.find(&["memory.low"]).is_some() { or_max(reservation) } else { reservation.to_string() };
            self.set(&["memory.soft_limit_in_bytes", "memory.low"], &value)?;
        }
        if let Some(off) = memory.disable_oom_killer().filter(|_| self.find(&["memory.oom_control"]).is_some()) {
            self.set(&["memory.oom_control"], &u8::from(off).to_string())?;
        }
        match memory.swappiness().filter(|_| self.find(&["memory.swappiness"]).is_some()) {
            Some(swappiness) => self.set(&["memory.swappiness"], &swappiness.to_string()),
            None => Ok(()),
        }
    }

    fn memory_version2(&mut self, memory: &LinuxMemory, limit: i64, swap: i64) -> Result<()> {
        let usage: i64 = self.find(&["memory.current"]).and_then(|file| read(&file).parse().ok()).unwrap_or(0);
        if memory.check_before_update().unwrap_or(false) && limit > 0 && limit < usage {
            return Err(Error::Update(format!("rejecting memory limit {limit} < usage {usage}")));
        }
        if swap != 0 {
            // Version 2 counts swap alone.
            let beside = if limit == 0 { self.find(&["memory.max"]).map(|file| read(&file)) } else { None };
            let beside = beside.map_or(limit, |text| text.parse().unwrap_or(-1));
            let value = match swap {
                -1 => "max".to_owned(),
                _ if beside <= 0 => return Err(Error::Update("unable to set swap limit without memory limit".into())),
                swap if swap < beside => {
                    return Err(Error::Update("memory+swap limit should be >= memory limit".into()));
                }
                swap => (swap - beside).to_string(),
            };
            // "Unlimited" is what a kernel without swap has anyway.
            if swap != -1 || self.find(&["memory.swap.max"]).is_some() {
                self.set(&["memory.swap.max"], &value)?;
            }
        }
        if limit == 0 { Ok(()) } else { self.set(&["memory.max"], &or_max(limit)) }
    }

    /// runc's words.
    fn memory_in_use(&self, error: Error, limit: i64) -> Error {
        match error {
            Error::Io { source, .. } if source.kind() == ErrorKind::ResourceBusy => {
                let number = |name| self.find(&[name]).map(|file| read(&file)).unwrap_or_default();
                Error::Update(format!(
                    "unable to set memory limit to {limit} (current usage: {}, peak usage: {})",
                    number("memory.usage_in_bytes"),
                    number("memory.max_usage_in_bytes")
                ))
            }
            other => other,
        }
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<()> {
        if let Some(idle) = cpu.idle() {
            // Where there is no such file, nobody is idle.
            if idle != 0 || self.find(&["cpu.idle"]).is_some() {
                self.set(&["cpu.idle"], &idle.to_string())?;
            }
        }
        let shares = cpu.shares().unwrap_or(0);
        if shares != 0 {
            match self.find(&["cpu.shares"]) {
                Some(_) => self.set(&["cpu.shares"], &shares.to_string())?,
                None => self.set(&["cpu.weight"], &weight_of_shares(shares).to_string())?,
            }
        }
        self.cpu_bandwidth(cpu)?;
        for (name, value) in [
            ("cpu.rt_period_us", cpu.realtime_period().map(|n| n.cast_signed())),
            ("cpu.rt_runtime_us", cpu.realtime_runtime()),
        ] {
            if let Some(value) = value.filter(|value| *value != 0) {
                self.set(&[name], &value.to_string())?;
            }
        }
        for (name, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                self.set(&[name], value)?;
            }
        }
        Ok(())
    }

    /// The kernel wants quota, period and burst to fit at every moment: what does not fit before the others may
    /// fit after them.
    fn cpu_bandwidth(&mut self, cpu: &LinuxCpu) -> Result<()> {
        let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
        let mut writes: Vec<(&str, String)> = Vec::new();
        if let Some(burst) = cpu.burst() {
            let name = if self.find(&["cpu.max.burst"]).is_some() { "cpu.max.burst" } else { "cpu.cfs_burst_us" };
            writes.push((name, burst.to_string()));
        }
        if let Some(file) = self.find(&["cpu.max"]) {
            let now = read(&file);
            let (old_quota, old_period) = now.split_once(' ').unwrap_or(("max", "100000"));
            let quota_text = if quota == 0 { old_quota.to_owned() } else { or_max(quota) };
            let period_text = if period == 0 { old_period.to_owned() } else { period.to_string() };
            if quota != 0 || period != 0 {
                writes.push(("cpu.max", format!("{quota_text} {period_text}")));
            }
        } else {
            writes.extend((period != 0).then(|| ("cpu.cfs_period_us", period.to_string())));
            writes.extend((quota != 0).then(|| ("cpu.cfs_quota_us", quota.to_string())));
        }
        let mut again = Vec::new();
        for (name, value) in writes {
            match self.set(&[name], &value) {
                Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::EINVAL as i32) => {
                    again.insert(0, (name, value));
                }
                set => set?,
            }
        }
        again.into_iter().try_for_each(|(name, value)| self.set(&[name], &value))
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) -> Result<()> {
        let weight = block_io.weight().unwrap_or(0);
        if weight != 0 {
            let linear = ["blkio.bfq.weight", "blkio.weight", "io.bfq.weight"];
            match self.find(&linear) {
                Some(_) => self.set(&linear, &weight.to_string())?,
                // 10 to 1000 there, 1 to 10000 here.
                None => {
                    let weight = 1 + u32::from(weight.saturating_sub(10)) * 9999 / 990;
                    self.set(&["io.weight"], &format!("default {weight}"))?;
                }
            }
        }
        for (file, key, devices) in [
            ("blkio.throttle.read_bps_device", "rbps", block_io.throttle_read_bps_device()),
            ("blkio.throttle.write_bps_device", "wbps", block_io.throttle_write_bps_device()),
            ("blkio.throttle.read_iops_device", "riops", block_io.throttle_read_iops_device()),
            ("blkio.throttle.write_iops_device", "wiops", block_io.throttle_write_iops_device()),
        ] {
            for device in devices.iter().flatten() {
                self.throttle(file, key, device)?;
            }
        }
        Ok(())
    }

    fn throttle(&mut self, file: &str, key: &str, device: &LinuxThrottleDevice) -> Result<()> {
        let (major, minor, rate) = (device.major(), device.minor(), device.rate());
        match self.find(&["io.max"]) {
            Some(_) if rate == 0 => self.set(&["io.max"], &format!("{major}:{minor} {key}=max")),
            Some(_) => self.set(&["io.max"], &format!("{major}:{minor} {key}={rate}")),
            None => self.set(&[file], &format!("{major}:{minor} {rate}")),
        }
    }

    fn find(&self, names: &[&str]) -> Option<PathBuf> {
        self.files.find(names)
    }

    fn set(&mut self, names: &[&str], value: &str) -> Result<()> {
        let file = self.find(names).ok_or_else(|| Error::NoController(names[0].to_owned()))?;
        let before = fs::read_to_string(&file).unwrap_or_default();
        fs::write(&file, value).map_err(|e| Error::io(&file, e))?;
        self.before.push((file, before));
        Ok(())
    }

    fn take_back(&mut self) {
        while let Some((file, before)) = self.before.pop() {
            // What holds a list of devices takes one in each write.
            for line in before.lines().filter(|line| !line.is_empty()) {
                let _ = fs::write(&file, line);
            }
        }
    }
}

fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

/// The weight that runc 1.3.2 and libcgroups give shares: a curve through the least, the default and the greatest value of both.
pub(super) fn weight_of_shares(shares: u64) -> u64 {
    let log = (shares.clamp(2, 1 << 18) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10_f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

/// A container that has no group in resctrl yet gets one of its own, as under runc.
fn set_schemata(store: &Store, state: &State, schemata: &Schemata) -> Result<()> {
    let mut wanted = LinuxIntelRdt::default();
    wanted.set_l3_cache_schema(schemata.l3_cache.clone()).set_mem_bw_schema(schemata.memory_bandwidth.clone());
    let lines = rdt::schemata(&wanted)?;
    match &state.rdt {
        _ if lines.is_empty() => Ok(()),
        Some(group) => rdt::write_schemata(&group.schemata_file(), &lines),
        None => {
            let group = Group::own(&state.id)?;
            let locked = store.lock(&state.id)?;
            locked.save(&State { rdt: Some(group.clone()), ..locked.load()? })?;
            group.make(&wanted)?;
            Cgroup::at(&state.cgroup).pids()?.into_iter().try_for_each(|pid| group.add(pid))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Limits of a cgroup that is plain files.
    fn limits(name: &str, files: &[(&str, &str)]) -> Limits {
        let dir = std::env::temp_dir().join(format!("lmrun-update-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        for (name, value) in files {
            fs::write(dir.join(name), value).unwrap();
        }
        Limits { files: CgroupFiles { dirs: vec![dir] }, before: Vec::new() }
    }

    fn apply(limits: &mut Limits, json: &str) -> Result<()> {
        limits.set_all(&serde_json::from_str(json).unwrap())
    }

    fn shown(limits: &Limits, name: &str) -> String {
        fs::read_to_string(limits.files.dirs[0].join(name)).unwrap()
    }

    /// What containerd sends for `docker update --memory 128m`.
    const BY_CONTAINERD: &str = r#"{"memory":{"limit":134217728,"reservation":0,"swap":268435456,"kernel":0},
        "cpu":{"shares":0,"quota":0,"period":0},"blockIO":{"weight":0}}"#;

    #[test]
    fn zeros_change_nothing() {
        let mut limits = limits(
            "zeros",
            &[("memory.limit_in_bytes", "1"), ("memory.memsw.limit_in_bytes", "1"), ("cpu.shares", "9")],
        );
        apply(&mut limits, BY_CONTAINERD).unwrap();
        assert_eq!(shown(&limits, "memory.limit_in_bytes"), "134217728");
        assert_eq!(shown(&limits, "memory.memsw.limit_in_bytes"), "268435456");
        assert_eq!(
            limits.before[0].0.file_name().unwrap(),
            "memory.memsw.limit_in_bytes",
            "upwards: the outer one first"
        );
        assert_eq!(shown(&limits, "cpu.shares"), "9");
        limits.take_back();
        assert_eq!(shown(&limits, "memory.limit_in_bytes"), "1");
        fs::remove_dir_all(&limits.files.dirs[0]).unwrap();
    }

    #[test]
    fn version_2_has_other_numbers() {
        let files = [
            ("memory.max", "max"),
            ("memory.swap.max", "max"),
            ("memory.current", "4096"),
            ("cpu.weight", "100"),
            ("cpu.max", "max 100000"),
            ("io.weight", "100"),
            ("pids.max", "max"),
        ];
        let mut limits = limits("v2", &files);
        apply(&mut limits, BY_CONTAINERD).unwrap();
        assert_eq!(shown(&limits, "memory.swap.max"), "134217728");
        apply(&mut limits, r#"{"cpu":{"shares":1024,"quota":50000},"blockIO":{"weight":1000},"pids":{"limit":-1}}"#)
            .unwrap();
        assert_eq!(shown(&limits, "cpu.weight"), "100");
        assert_eq!(shown(&limits, "cpu.max"), "50000 100000");
        assert_eq!(shown(&limits, "io.weight"), "default 10000");
        assert_eq!(shown(&limits, "pids.max"), "max");
        let smaller = apply(&mut limits, r#"{"memory":{"limit":1024,"checkBeforeUpdate":true}}"#).unwrap_err();
        assert_eq!(smaller.to_string(), "rejecting memory limit 1024 < usage 4096");
        apply(&mut limits, r#"{"memory":{"limit":-1}}"#).unwrap();
        assert_eq!((shown(&limits, "memory.max").as_str(), shown(&limits, "memory.swap.max").as_str()), ("max", "max"));
        fs::remove_dir_all(&limits.files.dirs[0]).unwrap();
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!([0, 2, 1024, 262_144, u64::MAX].map(weight_of_shares), [1, 1, 100, 10_000, 10_000]);
    }
}

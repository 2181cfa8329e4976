//! What a scenario must leave behind on the host: nothing.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A file system in memory at a directory, as long as this lives.
pub struct InMemory {
    pub dir: PathBuf,
}

impl InMemory {
    /// At `dir`, which is made.
    pub fn mount(dir: PathBuf) -> std::io::Result<InMemory> {
        InMemory::of_size(dir, "80%")
    }

    /// As [`InMemory::mount`], of a size as tmpfs(5) has it.
    pub fn of_size(dir: PathBuf, size: &str) -> std::io::Result<InMemory> {
        fs::create_dir_all(&dir)?;
        crate::command::tool(&format!("mount -t tmpfs -o mode=755,size={size} lmrun-test {}", dir.display()));
        Ok(InMemory { dir })
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        unmount.arg("-l").arg(&self.dir);
        crate::command::run(&mut unmount, std::time::Duration::from_secs(20));
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The cgroups of container `id`, wherever one is mounted.
pub fn cgroups(id: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of_cgroups = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (at, kind) = (words.nth(1)?, words.next()?);
        kind.starts_with("cgroup").then(|| Path::new(at).join("lmrun-test"))
    });
    // After a move it has a number behind its name.
    let moved = format!("{id}.");
    let own = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name == id || name.starts_with(&moved)
    };
    let entries = of_cgroups.filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).filter(own).collect()
}

/// Whether any cgroup of container `id` is frozen or about to be.
pub fn frozen(id: &str) -> bool {
    cgroups(id).iter().any(|dir| {
        let says =
            |file: &str, word: &str| fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim().contains(word));
        says("cgroup.freeze", "1") || says("freezer.state", "FROZEN") || says("freezer.state", "FREEZING")
    })
}

/// The processes in the cgroups of container `id`.
pub fn processes(id: &str) -> Vec<i32> {
    let lists = cgroups(id).into_iter().filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
    let mut all: Vec<i32> =
        lists.flat_map(|text| text.lines().filter_map(|l| l.parse().ok()).collect::<Vec<_>>()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Writes a script for sh(1). By another process: a fork of ours elsewhere could hold it open for writing, and nobody could
/// execute it until that has executed another program (ETXTBSY).
#[track_caller]
pub fn script(path: &Path, text: &str) {
    let mut writer = Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("there is a shell");
    let whole = format!("#!/bin/sh\n{text}\n");
    let mut stdin = writer.stdin.take().expect("it is a pipe");
    stdin.write_all(whole.as_bytes()).expect("cat reads all");
    drop(stdin);
    assert!(writer.wait().is_ok_and(|status| status.success()), "{} can be written", path.display());
}

/// Processes whose command line contains all of `words`: (pid, command line).
pub fn commands(words: &[&str]) -> Vec<(i32, String)> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (pid != std::process::id() as i32 && words.iter().all(|w| line.contains(w))).then_some((pid, line))
    })
    .collect()
}

/// Kills what is left of container `id`, and takes its cgroups away.
pub fn sweep(id: &str) {
    for pid in processes(id) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
    }
    for _ in 0..100 {
        let left = cgroups(id);
        if left.is_empty() {
            break;
        }
        for dir in left {
            let _ = fs::write(dir.join("cgroup.freeze"), "0");
            let _ = fs::write(dir.join("freezer.state"), "THAWED");
            let _ = fs::remove_dir(dir);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

//! Where a root file system has its changes: what Docker, containerd and Podman mount is an overlay.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Error, Result};
use crate::sys::proc::{self, Mount};

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// What is mounted there is an overlay, overlayfs(5).
    Overlay {
        /// The topmost first.
        lower: Vec<PathBuf>,
        /// None: it is read-only.
        upper: Option<PathBuf>,
        work: Option<PathBuf>,
    },
    /// A directory that has all.
    Plain(PathBuf),
}

/// Looks at what is mounted at `rootfs` in the mount namespace of this process.
pub fn layout(rootfs: &Path) -> Result<Layout> {
    let rootfs = fs::canonicalize(rootfs).map_err(Error::io("find", rootfs))?;
    let mounts = proc::mounts(std::process::id() as i32).map_err(Error::io("read", "/proc/self/mountinfo"))?;
    of(&rootfs, &mounts)
}

fn of(rootfs: &Path, mounts: &[Mount]) -> Result<Layout> {
    // What was mounted last hides the others.
    let top = mounts.iter().rev().find(|m| Path::new(&m.point) == rootfs);
    let Some(overlay) = top.filter(|m| m.fs_type == "overlay" && m.root == "/") else {
        return Ok(Layout::Plain(rootfs.to_owned()));
    };
    // A list in one option, or since Linux 6.5 one option for each.
    let mut lower: Vec<String> = overlay.values("lowerdir").iter().flat_map(|list| split(list)).collect();
    lower.extend(overlay.values("lowerdir+"));
    let (upper, work) = (overlay.values("upperdir").pop(), overlay.values("workdir").pop());
    let all: Vec<&String> = lower.iter().chain(&upper).chain(&work).collect();

    // Docker and containerd shorten a long list of options: they change into a directory above all of them first.
    let base = if all.iter().all(|path| path.starts_with('/')) {
        Path::new("/")
    } else {
        let is_base = |base: &&Path| all.iter().all(|path| base.join(path).is_dir());
        let above = |path| Path::new(path).ancestors();
        let upper_s = upper.iter().filter(|path| path.starts_with('/')).flat_map(above);
        rootfs.ancestors().chain(upper_s).find(is_base).ok_or_else(|| {
            let missing =
                all.iter().find(|path| !path.starts_with('/')).map(|path| path.to_string()).unwrap_or_default();
            Error::LayoutUnknown { path: rootfs.to_owned(), missing }
        })?
    };
    let found = |path: &String| {
        let path = base.join(path);
        fs::canonicalize(&path).map_err(Error::io("find", &path))
    };
    Ok(Layout::Overlay {
        lower: lower.iter().map(found).collect::<Result<_>>()?,
        upper: upper.as_ref().map(found).transpose()?,
        work: work.as_ref().map(found).transpose()?,
    })
}

/// What is to be copied: files, and bytes on the disk. Of what runs it is an estimate; files with several names count for each.
pub fn usage(root: &Path) -> Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Removed since.
            Err(e) if e.kind() == ErrorKind::NotFound && dir != root => continue,
            Err(e) => return Err(Error::io("list", dir)(e)),
        };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            files += 1;
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok((files, bytes))
}

/// A list with colons between, which a backslash takes their meaning from. Two colons set layers apart that have data alone.
fn split(list: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut chars = list.chars();
    while let Some(c) = chars.next() {
        let last = all.last_mut().expect("has one");
        match c {
            '\\' => last.extend(chars.next()),
            ':' if last.is_empty() => {}
            ':' => all.push(String::new()),
            c => last.push(c),
        }
    }
    all.retain(|path| !path.is_empty());
    all
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mounted(point: &Path, fs_type: &str, of_fs: &str) -> Mount {
        Mount {
            id: 1,
            device: "0:1".into(),
            root: "/".into(),
            point: point.to_str().unwrap().into(),
            read_only: false,
            fs_type: fs_type.into(),
            of_fs: of_fs.into(),
        }
    }

    #[test]
    fn usage_is_counted() {
        let dir = std::env::temp_dir().join(format!("lmrun-usage-{}", std::process::id()));
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(dir.join("a/b/file"), vec![1; 100_000]).unwrap();
        fs::File::create(dir.join("hole")).unwrap().set_len(1 << 30).unwrap();
        let (files, bytes) = usage(&dir).unwrap();
        assert_eq!(files, 4);
        assert!((100_000..1 << 20).contains(&bytes), "{bytes}");
        fs::remove_dir_all(&dir).unwrap();
        assert!(usage(&dir).is_err());
    }

    #[test]
    fn lists_are_split_where_no_backslash_says_otherwise() {
        assert_eq!(split("/a:/b"), ["/a", "/b"]);
        assert_eq!(split(r"/a\:x:/b\\"), ["/a:x", r"/b\"]);
        assert_eq!(split("/a::/data"), ["/a", "/data"]);
    }

    #[test]
    fn paths_that_are_not_absolute_are_found() {
        let home = std::env::temp_dir().join(format!("lmrun-layout-{}", std::process::id()));
        for dir in ["l", "1/diff", "2/diff", "3/diff", "3/work", "3/merged", "a, b:c"] {
            fs::create_dir_all(home.join(dir)).unwrap();
        }
        let home = fs::canonicalize(home).unwrap();
        symlink("../1/diff", home.join("l/ONE")).unwrap();
        symlink("../2/diff", home.join("l/TWO")).unwrap();
        let merged = home.join("3/merged");
        let expected = Layout::Overlay {
            lower: vec![home.join("2/diff"), home.join("1/diff")],
            upper: Some(home.join("3/diff")),
            work: Some(home.join("3/work")),
        };
        let with = |options: &str| of(&merged, &[mounted(&merged, "overlay", options)]);
        // Docker, whose home is above the mount; containerd, whose mounts are elsewhere; the new way to mount.
        assert_eq!(with("rw,lowerdir=l/TWO:l/ONE,upperdir=3/diff,workdir=3/work").unwrap(), expected);
        let absolute = |name: &str| home.join(name).display().to_string();
        let (upper, work) = (absolute("3/diff"), absolute("3/work"));
        let containerd = format!("rw,lowerdir=2/diff:1/diff,upperdir={upper},workdir={work}");
        let elsewhere = fs::canonicalize("/proc").unwrap();
        assert_eq!(of(&elsewhere, &[mounted(&elsewhere, "overlay", &containerd)]).unwrap(), expected);
        let each = format!(
            "rw,lowerdir+={},lowerdir+={},upperdir={upper},workdir={work}",
            absolute("2/diff"),
            absolute("1/diff")
        );
        assert_eq!(with(&each).unwrap(), expected);

        let odd = format!(r"ro,lowerdir={}/a\054\040b\134:c", home.display());
        let lower = vec![home.join("a, b:c")];
        assert_eq!(with(&odd).unwrap(), Layout::Overlay { lower, upper: None, work: None });
        let error = with("rw,lowerdir=nowhere").unwrap_err();
        assert!(matches!(error, Error::LayoutUnknown { missing, .. } if missing == "nowhere"));
        let hidden = [mounted(&merged, "overlay", &each), mounted(&merged, "ext4", "rw")];
        assert_eq!(of(&merged, &hidden).unwrap(), Layout::Plain(merged.clone()));
        assert_eq!(of(&merged, &[]).unwrap(), Layout::Plain(merged.clone()));
        fs::remove_dir_all(home).unwrap();
    }
}

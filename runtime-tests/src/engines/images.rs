//! Root file systems for images of engines.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::command;
use crate::needs;

/// Busybox by all of its names, and a user.
pub fn busybox(rootfs: &Path) -> std::io::Result<()> {
    for dir in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::set_permissions(rootfs.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")?;
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    let program = needs::on_path("busybox").ok_or(std::io::ErrorKind::NotFound)?;
    fs::copy(&program, rootfs.join("bin/busybox"))?;
    let names = command::run(Command::new(&program).arg("--list"), Duration::from_secs(20)).out;
    names
        .lines()
        .filter(|name| *name != "busybox")
        .try_for_each(|name| symlink("busybox", rootfs.join("bin").join(name)))
}

/// What a system has besides `/usr`.
pub fn host(rootfs: &Path) -> std::io::Result<()> {
    // Not a link: Docker puts its init there, and there is nothing to be put below `/usr`.
    for dir in ["sbin", "usr", "proc", "sys", "dev", "run", "tmp", "root", "srv", "var/tmp", "var/log", "var/lib"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    for dir in ["tmp", "var/tmp", "var/lib"] {
        fs::set_permissions(rootfs.join(dir), PermissionsExt::from_mode(0o1777))?;
    }
    for link in ["bin", "lib", "lib64"] {
        symlink(format!("usr/{link}"), rootfs.join(link))?;
    }
    command::tool(&format!("cp -a /etc {}", rootfs.join("etc").display()));
    let mtab = rootfs.join("etc/mtab");
    if mtab.is_symlink() { fs::remove_file(mtab) } else { Ok(()) }
}

use super::super::records::files::PipeDataEntry;
use super::super::records::inventory::{IMG_VERSION, InventoryEntry, PstreeEntry};
use super::super::records::stats::DumpStatsEntry;
use super::*;
use crate::image::format::{INVENTORY, PIPES_DATA, PSTREE, STATS_DUMP};
use crate::image::scratch::Scratch;

fn process(pid: u32) -> PstreeEntry {
    PstreeEntry { pid, ppid: pid - 1, pgid: 1, sid: 1, threads: vec![pid] }
}

fn inventory() -> InventoryEntry {
    InventoryEntry { img_version: IMG_VERSION, ..Default::default() }
}

/// An image directory with nothing but an inventory.
fn minimal(path: &Path, parent: Option<&str>) {
    let writer = ImageWriter::create(path, parent.map(Path::new)).unwrap();
    writer.write(&INVENTORY, 0, &[inventory()]).unwrap();
    writer.commit().unwrap();
}

fn names(path: &Path) -> Vec<String> {
    let mut all: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn what_is_written_is_read() {
    let tmp = Scratch::new();
    let path = tmp.path().join("a/b/image");
    let writer = ImageWriter::create(&path, None).unwrap();
    writer.write(&PSTREE, 0, &[process(1), process(2)]).unwrap();
    writer.write(&INVENTORY, 0, &[inventory()]).unwrap();
    let pipe =
        |pipe_id, text: &[u8]| (PipeDataEntry { pipe_id, bytes: text.len() as u32, size: Some(65536) }, text.to_vec());
    writer.write_payloads(&PIPES_DATA, 0, &[pipe(7, b"hello"), pipe(8, b"")]).unwrap();
    writer.raw_file("descriptors.json", b"[]").unwrap();
    assert!(!path.exists());
    writer.commit().unwrap();
    assert_eq!(names(path.parent().unwrap()), ["image"]);

    let dir = ImageDir::open(&path).unwrap();
    assert_eq!(dir.read_all(&PSTREE, 0).unwrap(), [process(1), process(2)]);
    assert_eq!(dir.read_one(&INVENTORY, 0).unwrap(), inventory());
    assert_eq!(dir.read_payloads(&PIPES_DATA, 0).unwrap(), [pipe(7, b"hello"), pipe(8, b"")]);
    assert!(matches!(dir.read_one(&PSTREE, 0), Err(Error::NotOne { found: 2, .. })));
    assert!(dir.exists(&PSTREE, 0).unwrap());
    assert!(!dir.exists(&format::CORE, 1).unwrap());
    assert!(dir.parent().unwrap().is_none());
}

#[test]
fn a_payload_of_another_length_is_refused() {
    let tmp = Scratch::new();
    let writer = ImageWriter::create(&tmp.path().join("image"), None).unwrap();
    let entry = PipeDataEntry { pipe_id: 1, bytes: 4, size: None };
    let error = writer.write_payloads(&PIPES_DATA, 0, &[(entry, vec![0; 3])]).unwrap_err();
    assert!(matches!(error, Error::Payload { said: 4, given: 3, .. }));
}

#[test]
fn an_unfinished_directory_leaves_nothing() {
    let tmp = Scratch::new();
    let path = tmp.path().join("image");
    let writer = ImageWriter::create(&path, None).unwrap();
    writer.write(&INVENTORY, 0, &[inventory()]).unwrap();
    drop(writer);
    assert!(names(tmp.path()).is_empty());
}

#[test]
fn only_images_and_empty_directories_are_replaced() {
    let tmp = Scratch::new();
    let path = tmp.path().join("image");
    fs::create_dir(&path).unwrap();
    minimal(&path, None);
    fs::write(path.join("old"), "").unwrap();
    let writer = ImageWriter::create(&path, None).unwrap();
    assert!(path.join("old").exists(), "until the commit");
    writer.write(&INVENTORY, 0, &[inventory()]).unwrap();
    writer.commit().unwrap();
    assert_eq!(names(&path), ["inventory.img"]);
    assert!(matches!(ImageWriter::create(Path::new("/"), None), Err(Error::Occupied { .. })));
    assert_eq!(names(tmp.path()), ["image"]);

    let other = tmp.path().join("other");
    minimal(&tmp.path().join("child"), Some("../image"));
    assert!(matches!(ImageWriter::create(&path, Some(Path::new("../child"))), Err(Error::ParentCycle { .. })));
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious"), "").unwrap();
    assert!(matches!(ImageWriter::create(&other, None), Err(Error::Occupied { .. })));
}

#[test]
fn what_dead_writers_left_is_removed_and_what_living_ones_make_is_not() {
    let tmp = Scratch::new();
    let path = tmp.path().join("image");
    let stale = tmp.path().join(".image.lmrun-1");
    fs::create_dir(&stale).unwrap();
    fs::write(stale.join("x"), "x").unwrap();
    let alive = tmp.path().join(".image.lmrun-2");
    let lock = make_locked(&alive).unwrap();
    minimal(&path, None);
    assert!(!stale.exists());
    assert!(alive.exists());
    drop(lock);
}

#[test]
fn a_parent_is_a_relative_link_to_images() {
    let tmp = Scratch::new();
    minimal(&tmp.path().join("one"), None);
    minimal(&tmp.path().join("two"), Some("../one"));
    let two = ImageDir::open(&tmp.path().join("two")).unwrap();
    let one = two.parent().unwrap().unwrap();
    assert_eq!(one.read_one(&INVENTORY, 0).unwrap(), inventory());
    assert!(one.parent().unwrap().is_none());
    assert_eq!(fs::read_link(tmp.path().join("two/parent")).unwrap(), Path::new("../one"));

    // All that a pre-dump to a page server leaves at the source.
    let writer = ImageWriter::create(&tmp.path().join("ours"), None).unwrap();
    writer.write(&format::LMRUN, 0, &[Default::default()]).unwrap();
    writer.commit().unwrap();
    minimal(&tmp.path().join("four"), Some("../ours"));
    fs::remove_dir_all(tmp.path().join("ours")).unwrap();
    fs::remove_dir_all(tmp.path().join("four")).unwrap();

    let three = tmp.path().join("three");
    fs::create_dir(tmp.path().join("empty")).unwrap();
    let create = |link: &Path| ImageWriter::create(&three, Some(link)).err().unwrap();
    assert!(matches!(create(Path::new("../none")), Error::Io { .. }));
    assert!(matches!(create(Path::new("../empty")), Error::NotImages { .. }));
    assert!(matches!(create(&tmp.path().join("one")), Error::ParentNotRelative { .. }));
    assert_eq!(names(tmp.path()), ["empty", "one", "two"]);
}

#[test]
fn a_circle_of_parents_is_found() {
    let tmp = Scratch::new();
    minimal(&tmp.path().join("one"), None);
    minimal(&tmp.path().join("two"), Some("../one"));
    symlink("../two", tmp.path().join("one/parent")).unwrap();
    let two = ImageDir::open(&tmp.path().join("two")).unwrap();
    let one = two.parent().unwrap().unwrap();
    assert!(matches!(one.parent(), Err(Error::ParentCycle { .. })));
}

#[test]
fn links_and_fifos_are_no_images() {
    let tmp = Scratch::new();
    let path = tmp.path().join("image");
    minimal(&path, None);
    symlink("inventory.img", path.join("pstree.img")).unwrap();
    nix::unistd::mkfifo(&path.join("cgroup.img"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let dir = ImageDir::open(&path).unwrap();
    assert!(matches!(dir.read_all(&PSTREE, 0), Err(Error::Io { .. })));
    assert!(matches!(dir.read_all(&format::CGROUP, 0), Err(Error::NotAFile { .. })));
}

#[test]
fn stats_have_a_family_of_their_own_and_replace_the_last_ones() {
    let tmp = Scratch::new();
    for pages_written in [1, 2] {
        let dump = DumpStatsEntry { pages_written, ..Default::default() };
        write_stats(tmp.path(), &STATS_DUMP, &StatsEntry { dump: Some(dump), restore: None }).unwrap();
    }
    assert_eq!(names(tmp.path()), ["stats-dump"]);
    let bytes = fs::read(tmp.path().join("stats-dump")).unwrap();
    assert_eq!(bytes[..8], [0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57]);
    let stats = ImageDir::open(tmp.path()).unwrap().read_one(&STATS_DUMP, 0).unwrap();
    assert_eq!(stats.dump.unwrap().pages_written, 2);
}

//! An image's archive (`docker save`) without the layers that the other end has.
//!
//! Whoever loads such an archive reads the content of those layers only that it does not know, so what it knows need
//! not be in there. Which files are layers is told by `manifest.json`, which may come last: the archive is read twice.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use tar::{Archive, Builder, EntryType};

const MANIFEST: &str = "manifest.json";
/// Longest manifest, in bytes.
const LONGEST: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    layers: Vec<PathBuf>,
}

/// What may be left out of an archive of one image whose lowest `known` layers the reader has.
pub fn to_leave_out(archive: impl Read, known: usize) -> io::Result<BTreeSet<PathBuf>> {
    let mut links = BTreeMap::new();
    let mut layers = None;
    for entry in Archive::new(archive).entries()? {
        let entry = entry?;
        let path = entry.path()?.into_owned();
        if let (EntryType::Symlink, Some(to)) = (entry.header().entry_type(), entry.link_name()?) {
            links.insert(path.clone(), resolved(&path, &to));
        }
        if path == Path::new(MANIFEST) {
            let images: Vec<Manifest> = serde_json::from_reader(entry.take(LONGEST))?;
            let [image] = <[Manifest; 1]>::try_from(images).map_err(|_| invalid("not one image"))?;
            layers = Some(image.layers);
        }
    }
    let layers = layers.ok_or_else(|| invalid("no manifest.json"))?;
    if known > layers.len() {
        return Err(invalid("fewer layers than the other end has"));
    }
    let file = |layer: &PathBuf| links.get(layer).unwrap_or(layer).clone();
    let (known, wanted) = layers.split_at(known);
    let wanted: BTreeSet<PathBuf> = wanted.iter().map(file).collect();
    Ok(known.iter().map(file).filter(|layer| !wanted.contains(layer)).collect())
}

/// Copies an archive but for some of its files, and links to them.
pub fn without(archive: impl Read, left_out: &BTreeSet<PathBuf>, to: &mut dyn Write) -> io::Result<()> {
    let mut written = Builder::new(to);
    for entry in Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let file = match entry.link_name()? {
            Some(to) if entry.header().entry_type() == EntryType::Symlink => resolved(&path, &to),
            _ => path,
        };
        if !left_out.contains(&file) {
            let header = entry.header().clone();
            written.append(&header, &mut entry)?;
        }
    }
    written.finish()
}

/// Where a link leads, by its words alone.
fn resolved(link: &Path, to: &Path) -> PathBuf {
    let mut path = link.parent().map(Path::to_owned).unwrap_or_default();
    for part in to.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::Normal(name) => path.push(name),
            _ => {}
        }
    }
    path
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::Header;

    fn add(to: &mut Builder<Vec<u8>>, path: &str, content: &str) {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        to.append_data(&mut header, path, content.as_bytes()).unwrap();
    }

    /// As Docker 20.10 writes it: layer c has the content of layer a.
    fn archive() -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        add(&mut archive, "a/layer.tar", "A");
        add(&mut archive, "b/layer.tar", "B");
        let mut link = Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        archive.append_link(&mut link, "c/layer.tar", "../a/layer.tar").unwrap();
        add(&mut archive, "0123.json", "{}");
        let manifest =
            r#"[{"Config":"0123.json","RepoTags":null,"Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}]"#;
        add(&mut archive, MANIFEST, manifest);
        archive.into_inner().unwrap()
    }

    fn names(archive: &[u8]) -> Vec<String> {
        let mut archive = Archive::new(archive);
        let entries = archive.entries().unwrap();
        entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn what_the_reader_has_is_left_out() {
        let archive = archive();
        let cases: [(usize, &[&str]); 4] = [
            (0, &["a/layer.tar", "b/layer.tar", "c/layer.tar", "0123.json", MANIFEST]),
            (1, &["a/layer.tar", "b/layer.tar", "c/layer.tar", "0123.json", MANIFEST]),
            (2, &["a/layer.tar", "c/layer.tar", "0123.json", MANIFEST]),
            (3, &["0123.json", MANIFEST]),
        ];
        for (known, expected) in cases {
            let left_out = to_leave_out(&archive[..], known).unwrap();
            let mut rest = Vec::new();
            without(&archive[..], &left_out, &mut rest).unwrap();
            assert_eq!(names(&rest), expected, "{known} known");
        }
        assert!(to_leave_out(&archive[..], 4).is_err());
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(to_leave_out(&b"nothing"[..], 0).is_err());
        let mut empty = Builder::new(Vec::new());
        add(&mut empty, "x", "");
        assert!(to_leave_out(&empty.into_inner().unwrap()[..], 0).is_err());
    }
}

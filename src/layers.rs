//! The architecture's fences, checked by reading the sources.

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer with those it may use.
const LAYERS: [(&str, &[&str]); 8] = [
    ("cli", &["migrate", "runtime", "engine", "transfer", "tracee", "image", "sys"]),
    ("migrate", &["runtime", "engine", "transfer", "tracee", "image", "sys"]),
    ("runtime", &["engine", "transfer", "tracee", "image", "sys"]),
    ("engine", &["tracee", "image", "sys"]),
    ("transfer", &["tracee", "image", "sys"]),
    ("tracee", &["sys"]),
    ("image", &["sys"]),
    ("sys", &[]),
];

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All files below `dir` with their text, comments left out.
fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            found.push((path, code.collect::<Vec<_>>().join("\n")));
        }
    }
    found
}

/// The first path segments that follow `crate::`, also in braces.
fn used(code: &str) -> Vec<&str> {
    let word = |text: &'_ str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => names.push(&rest[..word(rest)]),
            Some(list) => names.extend(list[..list.find("};").unwrap_or(0)].split(',').map(|item| {
                let item = item.trim();
                &item[..word(item)]
            })),
        }
    }
    names
}

#[test]
fn arrows_point_down() {
    let mut wrong = Vec::new();
    for (layer, below) in LAYERS {
        for (path, code) in sources(&src().join(layer)) {
            let upward = used(&code).into_iter().filter(|name| {
                *name != layer && LAYERS.iter().any(|(known, _)| known == name) && !below.contains(name)
            });
            wrong.extend(upward.map(|name| format!("{}: {layer} must not use {name}", path.display())));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_directory_is_a_layer() {
    for entry in fs::read_dir(src()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name();
        assert!(LAYERS.iter().any(|(layer, _)| name == *layer), "{name:?} has no place in the layers");
    }
}

#[test]
fn libcontainer_stays_in_runtime() {
    for (path, code) in sources(&src()) {
        let allowed = path.starts_with(src().join("runtime")) || path.ends_with("layers.rs");
        for library in ["libcontainer::", "libcgroups::"] {
            assert!(allowed || !code.contains(library), "{}: {library}", path.display());
        }
    }
}

#[test]
fn unsafe_stays_in_sys() {
    for (path, code) in sources(&src()) {
        let allowed = path.starts_with(src().join("sys")) || path.ends_with("layers.rs");
        for word in ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code)"] {
            assert!(allowed || !code.contains(word), "{}: {word}", path.display());
        }
    }
}

#[test]
fn names_are_found_in_lists_too() {
    let code = "use crate::sys::proc;\nuse crate::{image::Error, tracee};\nlet x = crate::engine::dump();";
    assert_eq!(used(code), ["sys", "image", "tracee", "engine"]);
}

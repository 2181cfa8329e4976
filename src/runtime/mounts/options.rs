//! The options of a mount in config.json (runtime specification, config.md, "Linux mount options").

use nix::mount::MsFlags;

use crate::sys::mount::{
    ATIME, Attributes, NOATIME, NODEV, NODIRATIME, NOEXEC, NOSUID, NOSYMFOLLOW, RDONLY, STRICTATIME,
};

/// What the options of one mount come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// Of this mount, and of all that is mounted below it too.
    pub own: Attributes,
    pub recursive: Attributes,
    /// In the order given: they are done when the whole root is made.
    pub propagation: Vec<MsFlags>,
    pub bind: Option<Bind>,
    /// Changes what is mounted there.
    pub remount: bool,
    pub idmap: Option<Recursion>,
    /// The file system's own.
    pub data: Vec<(String, Option<String>)>,
}

/// Whether what lies below comes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recursion {
    No,
    Yes,
}

pub type Bind = Recursion;

/// Name, attribute, whether it is set (or cleared).
const ATTRIBUTES: &[(&str, u64, bool)] = &[
    ("ro", RDONLY, true),
    ("rw", RDONLY, false),
    ("nosuid", NOSUID, true),
    ("suid", NOSUID, false),
    ("nodev", NODEV, true),
    ("dev", NODEV, false),
    ("noexec", NOEXEC, true),
    ("exec", NOEXEC, false),
    ("nodiratime", NODIRATIME, true),
    ("diratime", NODIRATIME, false),
    ("nosymfollow", NOSYMFOLLOW, true),
    ("symfollow", NOSYMFOLLOW, false),
];

/// The one way in which access times are written.
const ACCESS_TIMES: &[(&str, u64)] = &[
    ("relatime", 0),
    ("norelatime", STRICTATIME),
    ("noatime", NOATIME),
    ("atime", 0),
    ("strictatime", STRICTATIME),
    ("nostrictatime", 0),
];

const PROPAGATION: &[(&str, MsFlags)] = &[
    ("shared", MsFlags::MS_SHARED),
    ("slave", MsFlags::MS_SLAVE),
    ("private", MsFlags::MS_PRIVATE),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];

/// What is the default, or says nothing to a kernel of today.
const WITHOUT_EFFECT: &[&str] =
    &["defaults", "async", "nomand", "mand", "nolazytime", "noiversion", "iversion", "silent", "loud"];

impl Options {
    pub fn parse(words: &[String]) -> Options {
        let mut options = Options::default();
        for word in words {
            options.add(word);
        }
        options
    }

    fn add(&mut self, word: &str) {
        match word {
            "bind" => self.bind = self.bind.or(Some(Recursion::No)),
            "rbind" => self.bind = Some(Recursion::Yes),
            "remount" => self.remount = true,
            "idmap" => self.idmap = Some(Recursion::No),
            "ridmap" => self.idmap = Some(Recursion::Yes),
            _ if WITHOUT_EFFECT.contains(&word) => {}
            _ if attribute(&mut self.own, word) => {}
            _ => match word.strip_prefix('r') {
                Some(rest) if attribute(&mut self.recursive, rest) => {}
                rest => self.propagation_or_data(word, rest),
            },
        }
    }

    fn propagation_or_data(&mut self, word: &str, without_r: Option<&str>) {
        let known = |name: &str| PROPAGATION.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
        let flag = known(word).or_else(|| Some(known(without_r?)? | MsFlags::MS_REC));
        match (flag, word.split_once('=')) {
            (Some(flag), _) => self.propagation.push(flag),
            (None, Some((key, value))) => self.data.push((key.to_owned(), Some(value.to_owned()))),
            (None, None) => self.data.push((word.to_owned(), None)),
        }
    }
}

/// Notes the attribute that `word` names. The later of two that contradict each other holds.
fn attribute(into: &mut Attributes, word: &str) -> bool {
    if let Some((_, bit, set)) = ATTRIBUTES.iter().find(|(name, _, _)| *name == word) {
        let (to, from) = if *set { (&mut into.set, &mut into.clear) } else { (&mut into.clear, &mut into.set) };
        *to |= bit;
        *from &= !bit;
        return true;
    }
    let Some((_, bits)) = ACCESS_TIMES.iter().find(|(name, _)| *name == word) else {
        return false;
    };
    // mount_setattr(2): the whole field is cleared, and what is wanted set.
    into.clear |= ATIME;
    into.set = into.set & !ATIME | bits;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Options {
        Options::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn the_later_word_holds() {
        assert_eq!(parse(&["ro", "rw"]).own, Attributes { clear: RDONLY, ..Attributes::default() });
        let times = parse(&["noatime", "strictatime"]).own;
        assert_eq!((times.set, times.clear), (STRICTATIME, ATIME));
    }

    #[test]
    fn recursive_words_are_told_from_others() {
        let options = parse(&["rbind", "rro", "rprivate", "rnosuid", "ratime"]);
        assert_eq!((options.recursive.set, options.recursive.clear), (RDONLY | NOSUID, ATIME));
        assert_eq!(options.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert_eq!((options.bind, options.own), (Some(Recursion::Yes), Attributes::default()));
    }

    #[test]
    fn the_rest_is_the_file_systems() {
        let options = parse(&["nosuid", "mode=755", "newinstance", "size=64k"]);
        let data = [("mode", Some("755")), ("newinstance", None), ("size", Some("64k"))];
        let data = data.map(|(key, value): (&str, Option<&str>)| (key.to_owned(), value.map(str::to_owned)));
        assert_eq!(options.data, data);
    }
}

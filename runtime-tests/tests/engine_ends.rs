//! A container goes from one engine to another of its kind, step by step: described, prepared, started for processes
//! that arrive, and retired. What arrives is a checkpoint here.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use runtime_tests::command::{self, Done};
use runtime_tests::engines::{BUSYBOX, Engine, Engines};
use runtime_tests::needs;
use serde_json::Value;

const COUNTER: [&str; 3] = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"];
const LIMIT: Duration = Duration::from_secs(60);

/// A container that has been stopped on its host, and what was written of it.
struct Departed<'a> {
    host: &'a Engines,
    container: String,
    dir: PathBuf,
    about: Value,
}

impl<'a> Departed<'a> {
    /// Describes it, freezes it, and writes its checkpoint.
    #[track_caller]
    fn from(host: &'a Engines, container: &str) -> Departed<'a> {
        let dir = host.base.join("departed");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let driver = driver();
        let described = host.perform(&driver, &["describe", container]).ok().out;
        fs::write(dir.join("description"), &described).unwrap();
        let departed =
            Departed { host, container: container.into(), dir, about: serde_json::from_str(&described).unwrap() };
        let images = departed.path("images");
        departed.lmrun(&["pause"]).ok();
        departed.lmrun(&["checkpoint", "--leave-running", "--tcp-established", "--image-path", &images]).ok();
        departed
    }

    fn text(&self, pointer: &str) -> &str {
        self.about.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer}: {:#}", self.about))
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// `lmrun WORD... ID` where the container was.
    fn lmrun(&self, words: &[&str]) -> Done {
        let lmrun = needs::built("lmrun").display().to_string();
        let root = ["--root", self.text("/root")];
        self.host.perform(&lmrun, &root.iter().chain(words).copied().chain([self.text("/id")]).collect::<Vec<_>>())
    }

    /// Begins to receive it elsewhere; gives its id there.
    fn prepare(&self, at: &Engines, archive: Option<&str>, gives_up: bool) -> (Child, String) {
        let (description, images) = (self.path("description"), self.path("images"));
        let words = ["receive", &description, &images];
        let mut command = at.command(&driver(), &words.into_iter().chain(archive).collect::<Vec<_>>());
        if gives_up {
            command.env("GIVE_UP", "1");
        }
        let log = fs::File::create(self.dir.join("receive.log")).unwrap();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut id = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut id).unwrap();
        assert!(!id.is_empty(), "{}", self.log());
        (child, id.trim().to_owned())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("receive.log")).unwrap_or_default()
    }

    /// Lets what was prepared go; gives whether it came to run.
    fn go(&self, mut receiver: Child) -> bool {
        receiver.stdin.take().unwrap().write_all(b"\n").unwrap();
        command::wait(&mut receiver, LIMIT).is_some_and(|status| status.success())
    }

    /// All of it, the changes of its file system included.
    #[track_caller]
    fn arrive(&self, at: &Engines, archive: Option<&str>) {
        let (receiver, id) = self.prepare(at, archive, false);
        let upper = at.ok(Engine::Docker, &["inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", &id]);
        command::tool(&format!("cp -a {}/. {upper}", self.text("/rootfs/upper")));
        assert!(self.go(receiver), "{}", self.log());
    }

    #[track_caller]
    fn retire(&self, keep: bool) {
        self.host.perform(&driver(), &["retire", &self.path("description"), &keep.to_string()]).ok();
    }
}

fn driver() -> String {
    needs::built("engine_ends").display().to_string()
}

/// What a user sees of a container, but for what belongs to the host: ids, times, places of files.
fn seen(host: &Engines, name: &str) -> Value {
    let all = host.ok(Engine::Docker, &["inspect", name]);
    let mut all: Value = serde_json::from_str(&all).unwrap();
    let mut seen = all[0].take();
    let network = seen["NetworkSettings"]["Networks"]["lan"].take();
    let host_config = seen["HostConfig"].take();
    serde_json::json!({
        "name": seen["Name"], "image": seen["Image"], "config": without(&seen["Config"], &["MacAddress"]),
        "host": without(&host_config, &["PortBindings", "ContainerIDFile"]), "ports": seen["NetworkSettings"]["Ports"],
        "address": network["IPAddress"], "mac": network["MacAddress"], "length": network["IPPrefixLen"],
        "running": seen["State"]["Running"], "volume": seen["Mounts"][0]["Name"],
    })
}

fn without(value: &Value, fields: &[&str]) -> Value {
    let mut value = value.clone();
    if let Some(all) = value.as_object_mut() {
        fields.iter().for_each(|field| drop(all.remove(*field)));
    }
    value
}

#[track_caller]
fn counts_from(host: &Engines, name: &str, least: usize) {
    let lines = host.more_lines(Engine::Docker, name, 2);
    let numbers: Vec<usize> = lines.iter().filter_map(|line| line.parse().ok()).collect();
    assert!(numbers[0] >= least && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{lines:?}");
}

fn lines(host: &Engines, words: &[&str]) -> Vec<String> {
    host.ok(Engine::Docker, words).lines().map(str::to_owned).collect()
}

#[test]
fn docker() {
    if !needs::root() || !Engine::Docker.is_installed() {
        return;
    }
    let docker = Engine::Docker;
    let (a, b) = (Engines::start("ends-a"), Engines::start("ends-b"));
    // Both have the lower layer, one has the upper one.
    let rootfs = a.import_busybox(docker);
    b.import(docker, BUSYBOX, &rootfs);
    a.ok(docker, &["run", "--name", "layer", "--network", "none", BUSYBOX, "sh", "-c", "echo two >/layer"]);
    a.ok(docker, &["commit", "layer", "two:layers"]);
    a.ok(docker, &["rm", "layer"]);
    a.ok(docker, &["network", "create", "--subnet", "10.88.0.0/24", "--label", "of=lan", "lan"]);
    let options = "run --detach --name web --hostname www --network lan --ip 10.88.0.7 --network-alias alias --label app=web \
        --env A=b --restart always --publish 8080:80 --publish 81 --volume data:/data --memory 64m --memory-swap 64m \
        --health-cmd true --health-interval 1s --user 1000 --log-opt max-size=1m two:layers";
    a.ok(docker, &options.split_whitespace().chain(COUNTER).collect::<Vec<_>>());
    a.ok(docker, &["exec", "--user", "0", "web", "sh", "-c", "echo mine >/mine; rm /layer"]);
    a.more_lines(docker, "web", 4);
    let before = seen(&a, "web");
    assert!(Path::new(&a.ok(docker, &["inspect", "--format", "{{.LogPath}}", "web"])).exists());

    let web = Departed::from(&a, "docker://web");
    let counted = a.ok(docker, &["logs", "web"]).lines().count();
    assert_eq!(b.perform(&driver(), &["known", &web.path("description")]).ok().out.trim(), "1");
    let archive = web.path("archive");
    let export = format!("{} export {} 1 >{archive}", driver(), web.path("description"));
    a.perform("sh", &["-c", &export]).ok();
    let whole = format!("{} export {} 0 | wc -c", driver(), web.path("description"));
    let whole: u64 = a.perform("sh", &["-c", &whole]).ok().out.trim().parse().unwrap();
    assert!(fs::metadata(&archive).unwrap().len() < whole / 2, "the lower layer is most of it");

    // It is given up when all was ready: nothing stays at the destination.
    let (receiver, id) = web.prepare(&b, Some(&archive), true);
    assert_eq!(lines(&b, &["ps", "--all", "--quiet", "--no-trunc"]), [id]);
    assert!(!web.go(receiver));
    assert!(web.log().contains("given up"), "{}", web.log());
    assert_eq!(lines(&b, &["ps", "--all", "--quiet"]), [""; 0]);
    assert_eq!(lines(&b, &["network", "ls", "--quiet", "--filter", "name=lan"]), [""; 0]);
    assert_eq!(lines(&b, &["volume", "ls", "--quiet"]), [""; 0]);
    // And its receiver is killed: the same.
    let (mut receiver, _) = web.prepare(&b, None, false);
    receiver.kill().unwrap();
    receiver.wait().unwrap();
    let gone = || (lines(&b, &["ps", "--all", "--quiet"]), lines(&b, &["volume", "ls", "--quiet"])) == (vec![], vec![]);
    assert!(
        (0..200).any(|_| gone() || {
            std::thread::sleep(Duration::from_millis(50));
            false
        }),
        "it is not removed"
    );

    web.arrive(&b, None);
    assert_eq!(seen(&b, "web"), before);
    counts_from(&b, "web", counted);
    assert_eq!(
        b.ok(docker, &["exec", "web", "sh", "-c", "id -u; hostname; cat /mine; ls /layer 2>&1 | grep -c 'No such'"]),
        "1000\nwww\nmine\n1"
    );
    assert!(b.ok(docker, &["exec", "web", "ip", "address"]).contains("inet 10.88.0.7/24"));
    b.ok(docker, &["stats", "--no-stream", "web"]);
    b.ok(docker, &["top", "web"]);
    assert_eq!(b.ok(docker, &["network", "inspect", "--format", "{{.Labels.of}}", "lan"]), "lan");
    web.retire(false);
    assert_eq!(lines(&a, &["ps", "--all", "--quiet"]), [""; 0]);

    // And back, to an engine that has all of it; this time the source's is kept.
    let web = Departed::from(&b, "docker://web");
    assert_eq!(a.perform(&driver(), &["known", &web.path("description")]).ok().out.trim(), "all");
    web.arrive(&a, None);
    assert_eq!(seen(&a, "web"), before);
    counts_from(&a, "web", counted);
    web.retire(true);
    assert_eq!(
        b.ok(docker, &["inspect", "--format", "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}", "web"]),
        "exited no"
    );
    // A name that is in use is found before anything is made.
    let refused = a.perform(&driver(), &["receive", &web.path("description"), &web.path("images")]).failed();
    assert!(refused.err.contains("a container web is there already"), "{refused}");

    // It is a container like any other.
    a.ok(docker, &["restart", "--time", "1", "web"]);
    let last = a.more_lines(docker, "web", counted + 2);
    assert!(last.iter().filter(|line| *line == "1").count() >= 1, "the program began anew: {last:?}");
    a.ok(docker, &["stop", "--time", "1", "web"]);
    assert_eq!(web.container, "docker://web");
}

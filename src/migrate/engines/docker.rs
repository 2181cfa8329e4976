//! Docker, by its Engine API (from version 1.24 on, with Docker 20.10's 1.41 and 28's in mind).

use std::io::{BufWriter, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::http::{self, Server, escaped};
use super::inspect::{self, BUILT_IN, text};
use super::{Description, Engine, Error, Image, Note, Prepared, Result, Rootfs, archive, shim};
use crate::migrate::options::Container;

const NAME: &str = "Docker";
const SOCKET: &str = "/var/run/docker.sock";
/// The newest version of the API whose words are used here: the first in which an endpoint has a MAC address.
const NEWEST: (u32, u32) = (1, 44);
/// The storage driver whose containers have a directory of their changes.
const OVERLAY: &str = "overlay2";
const TAR: &str = "application/x-tar";

pub struct Docker {
    server: Server,
    api: (u32, u32),
}

impl Docker {
    /// By `DOCKER_HOST` where that names a socket, or the usual one.
    pub fn open() -> Result<Self> {
        let host = std::env::var("DOCKER_HOST").unwrap_or_default();
        Docker::at(Path::new(host.strip_prefix("unix://").unwrap_or(SOCKET)))
    }

    fn at(socket: &Path) -> Result<Self> {
        let server = Server::new(socket);
        let no_engine = |e| Error::NoEngine { engine: NAME, path: socket.to_owned(), source: Box::new(e) };
        let version = server.get("/version").map_err(no_engine)?;
        let number = |field| api_version(text(&version, field)).unwrap_or(NEWEST);
        // An engine that has forgotten this version understands its own oldest.
        let api =
            number("/ApiVersion").min(NEWEST).max(api_version(text(&version, "/MinAPIVersion")).unwrap_or((1, 0)));
        Ok(Docker { server: server.with_prefix(format!("/v{}.{}", api.0, api.1)), api })
    }

    fn inspect(&self, name: &str) -> Result<Value> {
        self.server.get(&format!("/containers/{}/json", escaped(name))).map_err(|e| match e.is_not_found() {
            true => Error::NoContainer { engine: NAME, name: name.to_owned() },
            false => told(e),
        })
    }

    fn image(&self, reference: &str) -> Result<Option<Value>> {
        found(self.server.get(&format!("/images/{}/json", escaped(reference))))
    }

    fn network(&self, name: &str) -> Result<Option<Value>> {
        found(self.server.get(&format!("/networks/{}", escaped(name))))
    }

    fn volume(&self, name: &str) -> Result<Option<Value>> {
        found(self.server.get(&format!("/volumes/{}", escaped(name))))
    }

    /// The image's name here: the same reference if that means the same image.
    fn reference<'a>(&self, image: &'a Image) -> Result<&'a str> {
        let same = self.image(&image.reference)?.is_some_and(|here| here["Id"] == *image.id);
        Ok(if same { &image.reference } else { &image.id })
    }

    fn make(&self, wanted: &Description, prepared: &mut Prepared) -> Result<()> {
        for network in &wanted.networks {
            if let Some(create) = &network.create
                && self.network(&network.name)?.is_none()
            {
                self.server.post("/networks/create", Some(create)).map_err(told)?;
                prepared.networks.push(network.name.clone());
            }
        }
        for volume in &wanted.volumes {
            if let Some(name) = &volume.name
                && self.volume(name)?.is_none()
            {
                let made = self.server.post("/volumes/create", Some(&volume.create)).map_err(told)?;
                prepared.volumes.push((name.clone(), PathBuf::from(text(&made, "/Mountpoint"))));
            }
        }
        let mut body = wanted.create.clone();
        body["Image"] = self.reference(&wanted.image)?.into();
        let info = self.server.get("/info").map_err(told)?;
        if let Some(runtime) = runtime(&info, text(&body, "/HostConfig/Runtime")) {
            body["HostConfig"]["Runtime"] = runtime.into();
        }
        let mut networks = wanted.networks.iter();
        if let Some(primary) = networks.next() {
            self.attach(&mut body, primary);
        }
        let made = self.server.post(&format!("/containers/create?name={}", escaped(&wanted.name)), Some(&body));
        prepared.id = text(&made.map_err(told)?, "/Id").to_owned();
        prepared.bundle = PathBuf::from(&prepared.id);
        prepared.upper = text(&self.inspect(&prepared.id)?, "/GraphDriver/Data/UpperDir").into();
        for network in networks {
            let body = json!({"Container": prepared.id, "EndpointConfig": self.endpoint(network)});
            self.server.post(&format!("/networks/{}/connect", escaped(&network.name)), Some(&body)).map_err(told)?;
        }
        Ok(())
    }

    /// The network that the container is made with.
    fn attach(&self, body: &mut Value, network: &super::Network) {
        let endpoint = self.endpoint(network);
        if endpoint.as_object().is_some_and(|fields| !fields.is_empty()) {
            body["NetworkingConfig"] = json!({"EndpointsConfig": {network.name.as_str(): endpoint}});
        }
        if let (Some(mac), true) = (&network.mac, self.api < NEWEST) {
            body["MacAddress"] = mac.as_str().into();
        }
    }

    fn endpoint(&self, network: &super::Network) -> Value {
        let mut endpoint = network.endpoint.clone();
        if let (Some(mac), true) = (&network.mac, self.api >= NEWEST) {
            endpoint["MacAddress"] = mac.as_str().into();
        }
        endpoint
    }

    /// Removes what can be removed; the first failure is told.
    fn unmake(&self, prepared: &Prepared) -> Result<()> {
        let mut targets = Vec::new();
        if !prepared.id.is_empty() {
            targets.push(format!("/containers/{}?force=true", prepared.id));
        }
        targets.extend(prepared.networks.iter().map(|name| format!("/networks/{}", escaped(name))));
        targets.extend(prepared.volumes.iter().map(|(name, _)| format!("/volumes/{}", escaped(name))));
        let failures: Vec<_> = targets.iter().filter_map(|target| found(self.server.delete(target)).err()).collect();
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    /// What is published by others already, or taken by anybody.
    fn taken_ports(&self, wanted: &Description) -> Vec<Note> {
        let bindings = wanted.create["HostConfig"]["PortBindings"].as_object();
        let mut notes = Vec::new();
        for (port, asked) in bindings.into_iter().flatten().filter(|(port, _)| port.ends_with("/tcp")) {
            for binding in asked.as_array().into_iter().flatten() {
                let Ok(number) = text(binding, "/HostPort").parse::<u16>() else { continue };
                let address = match text(binding, "/HostIp") {
                    "" => "0.0.0.0",
                    address => address,
                };
                if let Err(e) = TcpListener::bind((address, number)) {
                    notes.push(Note {
                        what: format!("port {address}:{number}, published for {port}: {e}"),
                        place: "destination".into(),
                        remedy: "end what listens there".into(),
                        blocks: true,
                    });
                }
            }
        }
        notes
    }

    fn check_network(&self, network: &super::Network) -> Result<Option<Note>> {
        let block = |what: String, remedy: &str| {
            Some(Note { what, place: "destination".into(), remedy: remedy.into(), blocks: true })
        };
        let name = &network.name;
        Ok(match (self.network(name)?, &network.create) {
            _ if BUILT_IN.contains(&name.as_str()) => None,
            (None, None) => block(format!("there is no network {name}, which spans hosts"), "join its swarm"),
            (None, Some(_)) => None,
            (Some(here), Some(wanted)) if !inspect::same_network(wanted, &here) => {
                block(format!("its network {name} has another driver or subnet"), "rename or remove it")
            }
            (Some(here), _) => {
                let members = here["Containers"].as_object().into_iter().flatten();
                let addresses =
                    members.flat_map(|(_, member)| ["/IPv4Address", "/IPv6Address"].map(|f| text(member, f)));
                let taken = |address: &str| {
                    network.addresses.iter().any(|own| address.split('/').next() == Some(&own.to_string()))
                };
                let mut addresses = addresses.filter(|address| taken(address));
                addresses.next().and_then(|address| {
                    block(
                        format!("address {address} in network {name} is taken"),
                        "disconnect the container that has it",
                    )
                })
            }
        })
    }
}

impl Engine for Docker {
    fn describe(&self, name: &str) -> Result<Description> {
        let inspect = self.inspect(name)?;
        let missing = |what| Error::Missing { engine: NAME, name: name.to_owned(), what };
        let id = text(&inspect, "/Id").to_owned();
        if inspect["State"]["Running"] != true {
            return Err(Error::NotRunning { name: name.to_owned() });
        }
        let init = inspect["State"]["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let place = shim::place(name, &id, init.ok_or_else(|| missing("its first process"))?)?;
        let image = self.image(text(&inspect, "/Image"))?.ok_or_else(|| missing("its image"))?;
        let layers = image["RootFS"]["Layers"].as_array().into_iter().flatten();
        let primary = inspect::primary(&inspect);
        let mut networks = Vec::new();
        for (name, endpoint) in inspect["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
            let create = self.network(name)?.and_then(|network| inspect::network_create(&network));
            networks.push(inspect::network(name, endpoint, &id[..id.len().min(12)], create));
        }
        networks.sort_by_key(|network| network.name != primary);
        let mut volumes = Vec::new();
        for mount in inspect["Mounts"].as_array().into_iter().flatten() {
            let about = match text(mount, "/Name") {
                "" => None,
                name => self.volume(name)?,
            };
            volumes.extend(inspect::volume(mount, about.as_ref()));
        }
        let name = text(&inspect, "/Name").trim_start_matches('/').to_owned();
        let rootfs = rootfs(&inspect, &place, &id)?;
        let mut notes = inspect::notes(&inspect);
        if rootfs.upper.is_none() {
            let driver = text(&inspect, "/GraphDriver/Name");
            notes.push(Note {
                what: format!("Docker's storage driver {driver} keeps no directory of what the container has changed"),
                place: "source".into(),
                remedy: "use overlay2".into(),
                blocks: true,
            });
        }
        Ok(Description {
            container: Container::Docker(name.clone()).to_string(),
            name,
            rootfs,
            image: Image {
                reference: text(&inspect, "/Config/Image").to_owned(),
                id: text(&image, "/Id").to_owned(),
                layers: layers.filter_map(|layer| layer.as_str().map(str::to_owned)).collect(),
            },
            id,
            root: place.root,
            bundle: place.bundle,
            networks,
            volumes,
            create: inspect::create(&inspect),
            restart: inspect["HostConfig"]["RestartPolicy"].clone(),
            notes,
        })
    }

    fn known_layers(&self, image: &Image) -> Result<Option<usize>> {
        if self.image(&image.id)?.is_some() {
            return Ok(None);
        }
        let all = self.server.get("/images/json?all=true").map_err(told)?;
        let mut most = 0;
        for listed in all.as_array().into_iter().flatten() {
            let Some(other) = self.image(text(listed, "/Id"))? else { continue };
            let others = other["RootFS"]["Layers"].as_array().into_iter().flatten();
            most = most.max(image.layers.iter().zip(others).take_while(|(own, other)| *own == *other).count());
        }
        Ok(Some(most))
    }

    fn export(&self, image: &Image, known: usize, to: &mut dyn Write) -> Result<()> {
        let target = format!("/images/{}/get", escaped(&image.id));
        let failed = |source| Error::Archive { what: "cannot be read", source };
        let left_out = match known {
            0 => Default::default(),
            _ => archive::to_leave_out(self.server.download(&target).map_err(told)?, known).map_err(failed)?,
        };
        let mut to = BufWriter::with_capacity(1 << 18, to);
        archive::without(self.server.download(&target).map_err(told)?, &left_out, &mut to).map_err(failed)?;
        to.flush().map_err(|source| Error::Archive { what: "cannot be sent", source })
    }

    fn import(&self, image: &Image, from: &mut dyn Read) -> Result<()> {
        let said = self.server.upload("/images/load?quiet=1", TAR, from).map_err(told)?;
        let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(failure) = lines.into_iter().find(|line| line["error"].is_string()) {
            return Err(Error::Load { engine: NAME, what: text(&failure, "/error").to_owned() });
        }
        if self.image(&image.id)?.is_none() {
            return Err(Error::Load { engine: NAME, what: format!("it is not {}", image.id) });
        }
        // A name that means another image here stays with that one.
        if let Some((name, tag)) = inspect::tag(&image.reference)
            && self.image(&image.reference)?.is_none()
        {
            let target = format!("/images/{}/tag?repo={}&tag={}", escaped(&image.id), escaped(name), escaped(tag));
            self.server.post(&target, None).map_err(told)?;
        }
        Ok(())
    }

    fn missing_volumes(&self, wanted: &Description) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        for name in wanted.volumes.iter().filter_map(|volume| volume.name.as_ref()) {
            if self.volume(name)?.is_none() {
                missing.push(name.clone());
            }
        }
        Ok(missing)
    }

    fn check(&self, wanted: &Description) -> Result<Vec<Note>> {
        let mut notes = wanted.notes.clone();
        let mut note = |blocks, what: String, remedy: &str| {
            notes.push(Note { what, place: "destination".into(), remedy: remedy.into(), blocks });
        };
        match self.inspect(&wanted.name) {
            Ok(_) => note(true, format!("a container {} is there already", wanted.name), "rename or remove it"),
            Err(Error::NoContainer { .. }) => {}
            Err(e) => return Err(e),
        }
        let info = self.server.get("/info").map_err(told)?;
        if runtime(&info, text(&wanted.create, "/HostConfig/Runtime")).is_none() {
            note(true, "Docker knows of no runtime lmrun".into(), "contrib/docker/enable.sh");
        }
        let driver = text(&info, "/Driver");
        if driver != OVERLAY {
            let what =
                format!("Docker's storage driver is {driver}, which keeps no directory of what a container changes");
            note(true, what, "use overlay2 there");
        }
        if let Some(here) = self.image(&wanted.image.reference)?
            && here["Id"] != *wanted.image.id
        {
            let what =
                format!("{} is another image: the container will name its own by digest", wanted.image.reference);
            note(false, what, "");
        }
        for volume in &wanted.volumes {
            match &volume.name {
                None if !volume.source.exists() => {
                    let what = format!(
                        "{}, which is bound to {}, is missing",
                        volume.source.display(),
                        volume.target.display()
                    );
                    note(true, what, "make it, or mount it");
                }
                Some(name) if self.volume(name)?.is_some() => {
                    note(false, format!("there is a volume {name} already"), "remove it if it is not the same");
                }
                _ => {}
            }
        }
        for network in &wanted.networks {
            notes.extend(self.check_network(network)?);
        }
        notes.extend(self.taken_ports(wanted));
        Ok(notes)
    }

    fn prepare(&self, wanted: &Description) -> Result<Prepared> {
        let mut prepared = Prepared::default();
        if let Err(e) = self.make(wanted, &mut prepared) {
            let _ = self.unmake(&prepared);
            return Err(e);
        }
        Ok(prepared)
    }

    fn start(&self, wanted: &Description, prepared: &Prepared) -> Result<Vec<Note>> {
        self.server.post(&format!("/containers/{}/start", prepared.id), None).map_err(told)?;
        let mut notes = Vec::new();
        let mut note = |what: String, remedy: String| {
            notes.push(Note { what, place: "destination".into(), remedy, blocks: false });
        };
        let policy = text(&wanted.restart, "/Name");
        if !matches!(policy, "" | "no") {
            let body = json!({"RestartPolicy": wanted.restart});
            if let Err(e) = self.server.post(&format!("/containers/{}/update", prepared.id), Some(&body)) {
                note(
                    format!("it has no restart policy: {e}"),
                    format!("docker update --restart={policy} {}", wanted.name),
                );
            }
        }
        let Ok(here) = self.inspect(&prepared.id) else { return Ok(notes) };
        for network in wanted.networks.iter().filter(|network| !network.addresses.is_empty()) {
            let endpoint = &here["NetworkSettings"]["Networks"][network.name.as_str()];
            let now = inspect::network(&network.name, endpoint, "", None);
            if now.addresses != network.addresses {
                note(
                    format!("its address in {} is {:?} now, not {:?}", network.name, now.addresses, network.addresses),
                    String::new(),
                );
            }
        }
        Ok(notes)
    }

    fn discard(&self, prepared: &Prepared) -> Result<()> {
        self.unmake(prepared)
    }

    fn retire(&self, left: &Description, keep: bool) -> Result<()> {
        let target = |verb: &str| format!("/containers/{}{verb}", left.id);
        match self.server.post(&target("/kill?signal=SIGKILL"), None) {
            // Not running: it has ended by itself, or at an earlier attempt.
            Err(http::Error::Status { status: 404 | 409, .. }) | Ok(_) => {}
            Err(e) => return Err(told(e)),
        }
        found(self.server.post(&target("/wait?condition=not-running"), None))?;
        if keep {
            // Those would bring it back when the engine starts.
            if matches!(text(&left.restart, "/Name"), "always" | "on-failure") {
                found(self.server.post(&target("/update"), Some(&json!({"RestartPolicy": {"Name": "no"}}))))?;
            }
            return Ok(());
        }
        match self.server.delete(&target("")) {
            // The engine is at it: `docker run --rm`.
            Err(http::Error::Status { status: 404 | 409, .. }) | Ok(_) => Ok(()),
            Err(e) => Err(told(e)),
        }
    }
}

fn told(e: http::Error) -> Error {
    Error::Engine { engine: NAME, source: Box::new(e) }
}

/// What there is; none: the engine does not have it.
fn found(answer: http::Result<Value>) -> Result<Option<Value>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(told(e)),
    }
}

/// What the runtime is called here that `wanted` calls so; none: lmrun is not among the runtimes.
fn runtime(info: &Value, wanted: &str) -> Option<String> {
    let runtimes = info["Runtimes"].as_object()?;
    let is_lmrun = |about: &Value| Path::new(text(about, "/path")).file_name().is_some_and(|name| name == "lmrun");
    if runtimes.get(wanted).is_some_and(is_lmrun) {
        return Some(wanted.to_owned());
    }
    runtimes.iter().find(|(_, about)| is_lmrun(about)).map(|(name, _)| name.clone())
}

fn api_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn rootfs(inspect: &Value, place: &shim::Place, id: &str) -> Result<Rootfs> {
    let mount = crate::runtime::Store::new(&place.root).load(id)?.rootfs;
    let data = &inspect["GraphDriver"]["Data"];
    let upper = text(data, "/UpperDir");
    Ok(Rootfs {
        mount,
        upper: (!upper.is_empty()).then(|| upper.into()),
        lower: text(data, "/LowerDir").split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn docker(api: (u32, u32)) -> Docker {
        Docker { server: Server::new(Path::new("/none")), api }
    }

    fn attached() -> super::super::Network {
        super::super::Network {
            name: "mynet".into(),
            create: None,
            endpoint: json!({"IPAMConfig": {"IPv4Address": "10.5.0.7"}}),
            addresses: Vec::new(),
            mac: Some("02:42:0a:05:00:07".into()),
        }
    }

    #[test]
    fn the_mac_address_is_where_the_engine_looks_for_it() {
        let mut body = json!({});
        docker((1, 41)).attach(&mut body, &attached());
        assert_eq!(body["MacAddress"], "02:42:0a:05:00:07");
        assert!(body.pointer("/NetworkingConfig/EndpointsConfig/mynet/MacAddress").is_none());
        let mut body = json!({});
        docker((1, 44)).attach(&mut body, &attached());
        assert!(body.get("MacAddress").is_none());
        assert_eq!(body["NetworkingConfig"]["EndpointsConfig"]["mynet"]["MacAddress"], "02:42:0a:05:00:07");
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert!(api_version("1.41") < api_version("1.44") && api_version("1.9") < api_version("1.41"));
        assert_eq!(api_version("x"), None);
    }

    #[test]
    fn who_does_not_listen_is_no_engine() {
        assert!(matches!(Docker::at(Path::new("/none")), Err(Error::NoEngine { .. })));
    }
}

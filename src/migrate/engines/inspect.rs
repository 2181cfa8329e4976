//! From what Docker says of a container, a network and a volume to the requests that make their like. Pure.

use std::net::IpAddr;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::{Network, Note, Volume};

/// Networks that every host has: nothing can be asked of them, addresses least of all.
pub const BUILT_IN: [&str; 3] = ["bridge", "host", "none"];

/// Text at a place in the answer; empty where there is none.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The body of the request that makes a container like the one in `inspect`; networks and restart policy apart.
pub fn create(inspect: &Value) -> Value {
    let mut body = inspect["Config"].as_object().cloned().unwrap_or_default();
    // Given with the network, in the form that the other engine understands.
    body.remove("MacAddress");
    let mut host = inspect["HostConfig"].as_object().cloned().unwrap_or_default();
    host.insert("RestartPolicy".into(), json!({"Name": "no"}));
    host.insert("NetworkMode".into(), primary(inspect).into());
    host.remove("ContainerIDFile");
    if text(inspect, "/HostConfig/UTSMode") == "host" {
        body.remove("Hostname");
    }
    pin_ports(&mut host, &inspect["NetworkSettings"]["Ports"]);
    name_volumes(&mut host, list(inspect, "/Mounts"));
    // Its volumes are named one by one now.
    host.insert("VolumesFrom".into(), Value::Null);
    host.insert("Links".into(), Value::Null);
    body.insert("HostConfig".into(), host.into());
    body.into()
}

/// The name of the network that a container is made with.
pub fn primary(inspect: &Value) -> String {
    let mode = text(inspect, "/HostConfig/NetworkMode");
    let networks = inspect["NetworkSettings"]["Networks"].as_object();
    let by_id = networks.into_iter().flatten().find(|(_, network)| {
        let id = text(network, "/NetworkID");
        id.len() >= 12 && mode.len() >= 12 && id.starts_with(mode)
    });
    match (mode, by_id) {
        ("default" | "", _) => "bridge".into(),
        (_, Some((name, _))) => name.clone(),
        (mode, None) => mode.to_owned(),
    }
}

/// Ports that the engine chose are asked for by number: those who know them go on knowing them.
fn pin_ports(host: &mut Map<String, Value>, actual: &Value) {
    let Some(bindings) = host.get_mut("PortBindings").and_then(Value::as_object_mut) else { return };
    for (port, asked) in bindings {
        let chosen: Vec<&str> = list(actual, &format!("/{}", port.replace('/', "~1")))
            .iter()
            .filter(|binding| !text(binding, "/HostIp").contains(':'))
            .map(|binding| text(binding, "/HostPort"))
            .collect();
        for (binding, chosen) in asked.as_array_mut().into_iter().flatten().zip(chosen) {
            if matches!(text(binding, "/HostPort"), "" | "0") {
                binding["HostPort"] = chosen.into();
            }
        }
    }
}

/// Volumes that the engine named (of an image's VOLUME, of other containers) are asked for by name, so that the ones
/// with the content are meant.
fn name_volumes(host: &mut Map<String, Value>, mounts: &[Value]) {
    for mount in mounts.iter().filter(|mount| mount["Type"] == "volume") {
        let (name, target) = (text(mount, "/Name"), text(mount, "/Destination"));
        let asked = host.get_mut("Mounts").and_then(Value::as_array_mut).into_iter().flatten();
        if let Some(asked) = asked.into_iter().find(|asked| asked["Target"] == target) {
            asked["Source"] = name.into();
            continue;
        }
        let binds = host.entry("Binds").or_insert(Value::Null);
        if binds.is_null() {
            *binds = json!([]);
        }
        let Some(binds) = binds.as_array_mut() else { continue };
        if !binds.iter().filter_map(Value::as_str).any(|bind| bind.split(':').nth(1) == Some(target)) {
            let mode = if mount["RW"] == false { ":ro" } else { "" };
            binds.push(format!("{name}:{target}{mode}").into());
        }
    }
}

/// What of a container cannot go along, or not as it is.
pub fn notes(inspect: &Value) -> Vec<Note> {
    let mut notes = Vec::new();
    for (field, what) in [("NetworkMode", "network"), ("IpcMode", "IPC"), ("PidMode", "pid")] {
        let mode = text(&inspect["HostConfig"], &format!("/{field}"));
        if let Some(other) = mode.strip_prefix("container:") {
            notes.push(Note {
                what: format!("it shares the {what} namespace of container {other}"),
                place: "container".into(),
                remedy: format!("give it a {what} namespace of its own"),
                blocks: true,
            });
        }
    }
    if !list(inspect, "/HostConfig/Links").is_empty() {
        notes.push(Note {
            what: "it has links to other containers, which stay here".into(),
            place: "container".into(),
            remedy: "put them on a network of their own, where names are found without links".into(),
            blocks: false,
        });
    }
    if primary(inspect) == "bridge" {
        notes.push(Note {
            what:
                "the default bridge gives it an address of the other host's choosing: if that is another one, it stays"
                    .into(),
            place: "container".into(),
            remedy: "give it a network that spans both hosts: docker network create --subnet ..., docker run --network"
                .into(),
            blocks: false,
        });
    }
    notes
}

/// How a container is attached to the network `name`.
pub fn network(name: &str, endpoint: &Value, short_id: &str, create: Option<Value>) -> Network {
    let addresses = ["/IPAddress", "/GlobalIPv6Address"].map(|field| text(endpoint, field));
    let mut asked = Map::new();
    if !BUILT_IN.contains(&name) {
        let ipam = ["IPv4Address", "IPv6Address"].into_iter().zip(addresses).filter(|(_, address)| !address.is_empty());
        asked
            .insert("IPAMConfig".into(), ipam.map(|(key, a)| (key.to_owned(), a.into())).collect::<Map<_, _>>().into());
        // The engine adds the new one's id by itself.
        let aliases: Vec<_> = list(endpoint, "/Aliases").iter().filter(|alias| *alias != short_id).cloned().collect();
        asked.insert("Aliases".into(), aliases.into());
        if !endpoint["DriverOpts"].is_null() {
            asked.insert("DriverOpts".into(), endpoint["DriverOpts"].clone());
        }
    }
    let mac = text(endpoint, "/MacAddress");
    Network {
        name: name.to_owned(),
        create,
        endpoint: asked.into(),
        addresses: addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()).collect(),
        mac: (!mac.is_empty()).then(|| mac.to_owned()),
    }
}

/// The body of the request that makes a network like this one; none where it belongs to more than one host.
pub fn network_create(network: &Value) -> Option<Value> {
    if text(network, "/Scope") != "local" || BUILT_IN.contains(&text(network, "/Name")) {
        return None;
    }
    let fields = [
        "Name",
        "Driver",
        "EnableIPv4",
        "EnableIPv6",
        "IPAM",
        "Internal",
        "Attachable",
        "ConfigOnly",
        "Options",
        "Labels",
    ];
    let mut body: Map<String, Value> =
        fields.into_iter().filter_map(|field| Some((field.to_owned(), network.get(field)?.clone()))).collect();
    body.insert("CheckDuplicate".into(), true.into());
    Some(body.into())
}

/// Whether a container of the one network finds itself at home in the other.
pub fn same_network(wanted: &Value, here: &Value) -> bool {
    let subnets = |network: &Value| {
        let mut all: Vec<_> = list(network, "/IPAM/Config").iter().map(|c| text(c, "/Subnet").to_owned()).collect();
        all.sort();
        all
    };
    wanted["Driver"] == here["Driver"] && subnets(wanted) == subnets(here)
}

/// A volume, or a bound directory; none: neither. `about` is what the engine says of the volume.
pub fn volume(mount: &Value, about: Option<&Value>) -> Option<Volume> {
    let [source, target] = ["/Source", "/Destination"].map(|field| PathBuf::from(text(mount, field)));
    match text(mount, "/Type") {
        "bind" => Some(Volume { name: None, create: Value::Null, source, target }),
        "volume" => {
            let name = text(mount, "/Name");
            let about = about.unwrap_or(&Value::Null);
            let create = json!({
                "Name": name,
                "Driver": text(mount, "/Driver"),
                "DriverOpts": about["Options"],
                "Labels": about["Labels"],
            });
            Some(Volume { name: Some(name.to_owned()), create, source, target })
        }
        _ => None,
    }
}

/// `NAME` and `TAG` of an image's reference; none where it is a digest.
pub fn tag(reference: &str) -> Option<(&str, &str)> {
    if reference.contains('@') || reference.starts_with("sha256:") {
        return None;
    }
    match reference.rsplit_once(':') {
        // A colon before a slash belongs to a port.
        Some((name, tag)) if !tag.contains('/') => Some((name, tag)),
        _ => Some((reference, "latest")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Docker 20.10 answers, cut to what is looked at.
    fn inspect() -> Value {
        json!({
            "Id": "a9a54c6728052ffffd5b93f2c19b9122e241fc5d82f8f4c13368781784938f2f",
            "Config": {"Hostname": "a9a54c672805", "Image": "bb", "Env": ["A=b"], "Labels": {"app": "web"},
                "Volumes": {"/cache": {}}, "MacAddress": "02:42:0a:05:00:07"},
            "HostConfig": {
                "Binds": ["vol1:/data", "/srv:/srv:ro"], "ContainerIDFile": "", "NetworkMode": "mynet",
                "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}], "81/tcp": [{"HostIp": "", "HostPort": ""}]},
                "RestartPolicy": {"Name": "always", "MaximumRetryCount": 0}, "Memory": 67108864, "UTSMode": "",
                "VolumesFrom": ["other"],
                "Mounts": [{"Type": "volume", "Source": "", "Target": "/anonymous"}],
            },
            "Mounts": [
                {"Type": "volume", "Name": "vol1", "Source": "/v/vol1/_data", "Destination": "/data", "Driver": "local", "RW": true},
                {"Type": "bind", "Source": "/srv", "Destination": "/srv", "RW": false},
                {"Type": "volume", "Name": "c0ffee", "Source": "/v/c0ffee/_data", "Destination": "/cache", "Driver": "local", "RW": false},
                {"Type": "volume", "Name": "f00d", "Source": "/v/f00d/_data", "Destination": "/anonymous", "Driver": "local", "RW": true},
            ],
            "NetworkSettings": {
                "Ports": {
                    "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}],
                    "81/tcp": [{"HostIp": "0.0.0.0", "HostPort": "32768"}, {"HostIp": "::", "HostPort": "32768"}],
                },
                "Networks": {"mynet": {
                    "IPAMConfig": null, "Links": null, "Aliases": ["a9a54c672805", "www"],
                    "NetworkID": "cccb9a58b393a82b2ce46dd722b6c2696ff26b9c6bf021de4e9d31581e2674fa",
                    "IPAddress": "10.5.0.7", "GlobalIPv6Address": "", "MacAddress": "02:42:0a:05:00:07", "DriverOpts": null,
                }},
            },
        })
    }

    #[test]
    fn a_container_is_made_as_it_was() {
        let before = inspect();
        let body = create(&before);
        for same in ["Hostname", "Image", "Env", "Labels", "Volumes"] {
            assert_eq!(body[same], before["Config"][same], "{same}");
        }
        let host = &body["HostConfig"];
        assert_eq!(host["Memory"], 67108864);
        assert_eq!(host["RestartPolicy"], json!({"Name": "no"}), "nobody starts it but the move");
        assert_eq!(host["Binds"], json!(["vol1:/data", "/srv:/srv:ro", "c0ffee:/cache:ro"]));
        assert_eq!(host["Mounts"][0]["Source"], "f00d");
        assert_eq!(host["PortBindings"]["80/tcp"][0]["HostPort"], "8080");
        assert_eq!(host["PortBindings"]["81/tcp"][0]["HostPort"], "32768");
        assert!(host["VolumesFrom"].is_null());
        assert!(body.get("MacAddress").is_none() && host.get("ContainerIDFile").is_none());
    }

    #[test]
    fn the_primary_network_has_a_name() {
        let mut container = inspect();
        assert_eq!(primary(&container), "mynet");
        container["HostConfig"]["NetworkMode"] = "cccb9a58b393".into();
        assert_eq!(primary(&container), "mynet");
        container["HostConfig"]["NetworkMode"] = "default".into();
        assert_eq!(primary(&container), "bridge");
        assert!(notes(&container)[0].what.contains("default bridge"));
    }

    #[test]
    fn addresses_and_names_are_asked_for() {
        let endpoint = &inspect()["NetworkSettings"]["Networks"]["mynet"];
        let attached = network("mynet", endpoint, "a9a54c672805", None);
        assert_eq!(attached.endpoint, json!({"IPAMConfig": {"IPv4Address": "10.5.0.7"}, "Aliases": ["www"]}));
        assert_eq!(attached.addresses, ["10.5.0.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(attached.mac.as_deref(), Some("02:42:0a:05:00:07"));
        assert_eq!(network("bridge", endpoint, "", None).endpoint, json!({}), "it would refuse to be asked");
    }

    #[test]
    fn networks_are_made_and_compared() {
        let network = json!({"Name": "mynet", "Id": "cccb", "Scope": "local", "Driver": "macvlan", "EnableIPv6": false,
            "IPAM": {"Driver": "default", "Config": [{"Subnet": "10.5.0.0/24"}]}, "Internal": false, "Attachable": true,
            "Options": {"parent": "eth0"}, "Labels": {"x": "y"}, "Containers": {}});
        let body = network_create(&network).unwrap();
        assert_eq!((&body["Options"]["parent"], &body["Labels"]["x"]), (&json!("eth0"), &json!("y")));
        assert!(body.get("Id").is_none() && body.get("Containers").is_none());
        assert!(same_network(&body, &network));
        let mut other = network.clone();
        other["IPAM"]["Config"][0]["Subnet"] = "10.6.0.0/24".into();
        assert!(!same_network(&body, &other));
        other["Scope"] = "swarm".into();
        assert_eq!(network_create(&other), None);
        assert_eq!(network_create(&json!({"Name": "bridge", "Scope": "local"})), None);
    }

    #[test]
    fn volumes_and_bound_directories_are_told_apart() {
        let mounts = &inspect()["Mounts"];
        let about = json!({"Options": {"type": "tmpfs"}, "Labels": {"a": "b"}});
        let named = volume(&mounts[0], Some(&about)).unwrap();
        assert_eq!(named.name.as_deref(), Some("vol1"));
        assert_eq!((&named.create["DriverOpts"]["type"], &named.create["Labels"]["a"]), (&json!("tmpfs"), &json!("b")));
        assert_eq!(volume(&mounts[1], None).unwrap().name, None);
        assert_eq!(volume(&json!({"Type": "tmpfs"}), None), None);
    }

    #[test]
    fn what_others_have_a_part_in_stays() {
        let mut container = inspect();
        assert_eq!(notes(&container), []);
        container["HostConfig"]["PidMode"] = "container:abc".into();
        assert!(notes(&container)[0].blocks);
    }

    #[test]
    fn references_have_tags() {
        assert_eq!(tag("nginx"), Some(("nginx", "latest")));
        assert_eq!(tag("host:5000/a/b"), Some(("host:5000/a/b", "latest")));
        assert_eq!(tag("host:5000/a/b:v1"), Some(("host:5000/a/b", "v1")));
        assert_eq!(tag("nginx@sha256:00"), None);
        assert_eq!(tag("sha256:00"), None);
    }
}

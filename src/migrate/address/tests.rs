use super::*;

fn interface() -> Interface {
    let address = Address { local: vec![10, 0, 0, 1], prefix: 24, ..Address::default() };
    Interface {
        name: "eth0".into(),
        mac: vec![2; 6],
        mtu: 1500,
        up: true,
        addresses: vec![address],
        ..Interface::default()
    }
}

fn route() -> Route {
    let hop = Hop { interface: "eth0".into(), gateway: vec![10, 0, 0, 254], ..Hop::default() };
    Route { family: 2, table: 254, kind: 1, hops: vec![hop], ..Route::default() }
}

fn sound() -> Interfaces {
    let neighbour = Neighbour { interface: "eth0".into(), ip: vec![10, 0, 0, 9], mac: vec![2; 6], flags: 0 };
    Interfaces { interfaces: vec![interface()], routes: vec![route()], neighbours: vec![neighbour], rules: vec![] }
}

#[test]
fn what_is_read_is_believed() {
    sound().check().unwrap();
    assert_eq!(Interfaces::from_bytes(&sound().to_bytes()).unwrap(), sound());
    assert_eq!(sound().addresses(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn what_another_host_makes_up_is_not() {
    let bad: [fn(&mut Interfaces); 14] = [
        |n| n.interfaces[0].name = "a/b".into(),
        |n| n.interfaces[0].name = "a-name-that-is-too-long".into(),
        |n| n.interfaces[0].name = String::new(),
        |n| n.interfaces[0].mac = vec![0; 33],
        |n| n.interfaces[0].addresses[0].local = vec![1; 5],
        |n| n.interfaces[0].addresses[0].prefix = 33,
        |n| n.interfaces[0].addresses[0].peer = vec![1; 16],
        |n| n.routes[0].family = 3,
        |n| n.routes[0].dst = vec![1; 16],
        |n| n.routes[0].metrics = vec![0; 2000],
        |n| n.routes[0].hops = vec![Hop::default(); 300],
        |n| n.neighbours[0].ip = vec![],
        |n| n.rules = vec![vec![0; 2000]],
        |n| n.interfaces = vec![interface(); MOST + 1],
    ];
    for (number, spoil) in bad.iter().enumerate() {
        let mut network = sound();
        spoil(&mut network);
        assert!(matches!(network.check(), Err(Error::Wrong(_))), "{number}");
    }
}

//! Which devices a container may use where there is no version 1 devices controller: the rules of
//! config.json as a BPF program on the container's cgroup.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::bpf::Instruction;

// include/uapi/linux/bpf.h: what a program is called with, struct bpf_cgroup_dev_ctx.
const OFFSET_ACCESS_AND_TYPE: i16 = 0;
const OFFSET_MAJOR: i16 = 4;
const OFFSET_MINOR: i16 = 8;
pub(super) const BLOCK: i32 = 1;
pub(super) const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

// Registers: the result, the argument, and ours.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// One rule; None stands for all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub allow: bool,
    pub kind: Option<i32>,
    pub major: Option<i32>,
    pub minor: Option<i32>,
    access: i32,
}

impl Rule {
    /// What it is about: `r`, `w`, `m`.
    pub fn letters(&self) -> String {
        let letters = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')];
        letters.iter().filter(|(bit, _)| self.access & bit != 0).map(|(_, letter)| letter).collect()
    }
}

/// The rules of config.json with those that every container has.
pub(super) fn rules(configured: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    configured.iter().map(rule).chain(ALWAYS).collect()
}

/// What every container may use, as under runc: making nodes (not opening them), and the devices that
/// the runtime specification puts into every container.
const ALWAYS: [Rule; 11] = [
    node(BLOCK, None, None, MKNOD),
    node(CHARACTER, None, None, MKNOD),
    node(CHARACTER, Some(1), Some(3), ALL), // null
    node(CHARACTER, Some(1), Some(5), ALL), // zero
    node(CHARACTER, Some(1), Some(7), ALL), // full
    node(CHARACTER, Some(1), Some(8), ALL), // random
    node(CHARACTER, Some(1), Some(9), ALL), // urandom
    node(CHARACTER, Some(5), Some(0), ALL), // tty
    node(CHARACTER, Some(5), Some(1), ALL), // console
    node(CHARACTER, Some(5), Some(2), ALL), // ptmx
    node(CHARACTER, Some(136), None, ALL),  // pts
];

const fn node(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// The program for these rules, of which later ones outdo earlier ones.
pub(super) fn program(configured: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    let rules = rules(configured);
    let mut code = vec![
        load(TYPE, OFFSET_ACCESS_AND_TYPE),
        load(ACCESS, OFFSET_ACCESS_AND_TYPE),
        with_constant(RSH, ACCESS, 16),
        with_constant(AND, TYPE, 0xffff),
        load(MAJOR, OFFSET_MAJOR),
        load(MINOR, OFFSET_MINOR),
    ];
    for rule in rules.iter().rev() {
        let part = decide(rule);
        let last = part.len() == answer(rule.allow).len();
        code.extend(part);
        if last {
            return code; // without a test: the verifier refuses what nothing can reach
        }
    }
    code.extend(answer(true));
    code
}

/// The same rules for version 1: each a line, to be allowed or denied, in their order. cgroup-v1/devices.rst.
pub(super) fn version1(configured: &[LinuxDeviceCgroup]) -> Vec<(bool, String)> {
    let number = |number: Option<i32>| number.map_or("*".to_owned(), |n| n.to_string());
    let line = |rule: Rule| {
        let kind = match rule.kind {
            Some(BLOCK) => 'b',
            Some(_) => 'c',
            None => 'a',
        };
        (rule.allow, format!("{kind} {}:{} {}", number(rule.major), number(rule.minor), rule.letters()))
    };
    rules(configured).into_iter().map(line).collect()
}

/// Answers when the rule applies, else runs on. An allowing rule must cover all that is wanted, a denying one any of it.
fn decide(rule: &Rule) -> Vec<Instruction> {
    let answer = answer(rule.allow);
    let mut tests: Vec<Instruction> = Vec::new();
    tests.extend(rule.kind.map(|kind| jump(JNE_CONSTANT, TYPE, 0, kind)));
    if rule.access != ALL {
        tests.push(Instruction { code: MOV_REGISTER, registers: SCRATCH | ACCESS << 4, offset: 0, immediate: 0 });
        tests.push(with_constant(AND, SCRATCH, rule.access));
        tests.push(if rule.allow { jump(JNE_REGISTER, SCRATCH, ACCESS, 0) } else { jump(JEQ_CONSTANT, SCRATCH, 0, 0) });
    }
    tests.extend(rule.major.map(|major| jump(JNE_CONSTANT, MAJOR, 0, major)));
    tests.extend(rule.minor.map(|minor| jump(JNE_CONSTANT, MINOR, 0, minor)));
    // All jumps lead behind the answer.
    let length = tests.len() + answer.len();
    for (at, test) in tests.iter_mut().enumerate() {
        if matches!(test.code, JNE_CONSTANT | JNE_REGISTER | JEQ_CONSTANT) {
            test.offset = (length - at - 1) as i16;
        }
    }
    tests.extend(answer);
    tests
}

fn rule(rule: &LinuxDeviceCgroup) -> Rule {
    // config.json: absent or negative is any.
    let number = |number: Option<i64>| number.and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0);
    let access = rule.access().as_deref().unwrap_or("rwm").chars().map(|letter| match letter {
        'r' => READ,
        'w' => WRITE,
        'm' => MKNOD,
        _ => 0,
    });
    let kind = match rule.typ() {
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        _ => None,
    };
    Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: access.fold(0, |all, one| all | one),
    }
}

// linux/bpf_common.h and linux/bpf.h: class | operation | source.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x57;
const RSH: u8 = 0x77;
const MOV_CONSTANT: u8 = 0xb7;
const MOV_REGISTER: u8 = 0xbf;
const JEQ_CONSTANT: u8 = 0x15;
const JNE_CONSTANT: u8 = 0x55;
const JNE_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

fn load(register: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD_WORD, registers: register | CONTEXT << 4, offset, immediate: 0 }
}

fn with_constant(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: register, offset: 0, immediate }
}

fn jump(code: u8, register: u8, other: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: register | other << 4, offset: 0, immediate }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [with_constant(MOV_CONSTANT, RESULT, i32::from(allow)), with_constant(EXIT, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would: type, major, minor, what is wanted.
    fn allows(program: &[Instruction], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i32; 11];
        let mut at = 0;
        loop {
            let i = program[at];
            at += 1;
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let taken = match i.code {
                LOAD_WORD => {
                    registers[to] = context[i.offset as usize / 4];
                    false
                }
                AND => {
                    registers[to] &= i.immediate;
                    false
                }
                RSH => {
                    registers[to] >>= i.immediate;
                    false
                }
                MOV_CONSTANT => {
                    registers[to] = i.immediate;
                    false
                }
                MOV_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                JEQ_CONSTANT => registers[to] == i.immediate,
                JNE_CONSTANT => registers[to] != i.immediate,
                JNE_REGISTER => registers[to] != registers[from],
                EXIT => return registers[0] != 0,
                code => panic!("instruction {code:#x}"),
            };
            if taken {
                at += i.offset as usize;
            }
        }
    }

    fn compiled(rules: &str) -> Vec<Instruction> {
        program(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(rules).unwrap())
    }

    #[test]
    fn a_container_has_its_own_devices_and_no_others() {
        let default = compiled(r#"[{"allow": false, "access": "rwm"}]"#);
        assert!(allows(&default, CHARACTER, 1, 3, READ | WRITE));
        assert!(allows(&default, CHARACTER, 136, 7, READ));
        assert!(!allows(&default, CHARACTER, 1, 1, READ), "/dev/mem");
        assert!(!allows(&default, BLOCK, 8, 0, READ));
        assert!(allows(&default, BLOCK, 8, 0, MKNOD));
        assert!(!allows(&default, BLOCK, 8, 0, MKNOD | READ));
    }

    #[test]
    fn later_rules_outdo_earlier_ones() {
        let rules = compiled(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": true, "type": "b", "major": 8, "access": "r"},
                {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "r"}]"#,
        );
        assert!(allows(&rules, CHARACTER, 10, 229, READ | WRITE));
        assert!(!allows(&rules, CHARACTER, 10, 230, READ));
        assert!(allows(&rules, BLOCK, 8, 0, READ));
        assert!(!allows(&rules, BLOCK, 8, 0, READ | WRITE));
        assert!(!allows(&rules, BLOCK, 8, 1, READ));
    }

    #[test]
    fn version_1_takes_them_in_words() {
        let rules = r#"[{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "major": 8, "access": "rm"}]"#;
        let lines = version1(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(rules).unwrap());
        assert_eq!(lines[..2], [(false, "a *:* rwm".to_owned()), (true, "b 8:* rm".to_owned())]);
        assert!(lines.contains(&(true, "c 1:3 rwm".to_owned())));
    }

    #[test]
    fn everything_is_allowed_where_nothing_is_said() {
        assert!(allows(&compiled("[]"), BLOCK, 8, 0, READ | WRITE));
    }
}

//! The two eBPF programs by which v2 does what `devices`, `net_cls` and `net_prio` do on v1.
//!
//! They are made from a tenant's settings, a few instructions for each, without loops, maps or calls.

use super::machine::STANDARD_DEVICES;
use crate::ceiling::DeviceRule;
use crate::sys::bpf::Insn;

// `linux/bpf.h` and `linux/bpf_common.h`
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const STORE_WORD: u8 = 0x63; // BPF_STX | BPF_MEM | BPF_W
const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const COPY: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_UNLESS: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const READ: i32 = 2; // BPF_DEVCG_ACC_READ
const WRITE: i32 = 4; // BPF_DEVCG_ACC_WRITE
const BLOCK: i32 = 1; // BPF_DEVCG_DEV_BLOCK
const CHARACTER: i32 = 2; // BPF_DEVCG_DEV_CHAR

/// Registers: the verdict, the argument, and what the program itself uses.
const VERDICT: u8 = 0;
const ARGUMENT: u8 = 1;

const fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: to | from << 4, offset, immediate }
}

const fn verdict(allowed: bool) -> [Insn; 2] {
    [insn(SET, VERDICT, 0, 0, allowed as i32), insn(EXIT, 0, 0, 0, 0)]
}

/// Lets the standard devices and those in `rules` be opened as listed, and refuses everything else with `EPERM`.
///
/// The argument is a `struct bpf_cgroup_dev_ctx`: the kind of device in the low half of a word and the access in the
/// high one, the major, the minor.
pub(super) fn of_devices(rules: &[DeviceRule]) -> Vec<Insn> {
    const KIND: u8 = 2;
    const ACCESS: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    const REST: u8 = 6;
    let mut program = vec![
        insn(LOAD_WORD, KIND, ARGUMENT, 0, 0),
        insn(COPY, ACCESS, KIND, 0, 0),
        insn(AND, KIND, 0, 0, 0xffff),
        insn(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        insn(LOAD_WORD, MAJOR, ARGUMENT, 4, 0),
        insn(LOAD_WORD, MINOR, ARGUMENT, 8, 0),
    ];
    for rule in STANDARD_DEVICES.iter().chain(rules) {
        let allowed = if rule.read { READ } else { 0 } | if rule.write { WRITE } else { 0 };
        // each jump goes to the next rule
        program.extend([
            insn(JUMP_UNLESS, KIND, 0, 7, if rule.block { BLOCK } else { CHARACTER }),
            insn(JUMP_UNLESS, MAJOR, 0, 6, rule.device.major.cast_signed()),
            insn(JUMP_UNLESS, MINOR, 0, 5, rule.device.minor.cast_signed()),
            insn(COPY, REST, ACCESS, 0, 0),
            insn(AND, REST, 0, 0, !allowed),
            insn(JUMP_UNLESS, REST, 0, 2, 0),
        ]);
        program.extend(verdict(true));
    }
    program.extend(verdict(false));
    program
}

/// Gives each new socket a mark and a priority, where there is one, which its packets carry; refuses none.
///
/// The argument is a `struct bpf_sock`.
pub(super) fn of_sockets(class: Option<u32>, priority: Option<u32>) -> Vec<Insn> {
    const VALUE: u8 = 2;
    const MARK_AT: i16 = 16;
    const PRIORITY_AT: i16 = 20;
    let mut program = Vec::new();
    for (value, at) in [(class, MARK_AT), (priority, PRIORITY_AT)] {
        if let Some(value) = value {
            program.push(insn(SET, VALUE, 0, 0, value.cast_signed()));
            program.push(insn(STORE_WORD, ARGUMENT, VALUE, at, 0));
        }
    }
    program.extend(verdict(true));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ceiling::DeviceNumber;

    /// What the kernel would make of a program about devices.
    fn run(program: &[Insn], context: [i32; 3]) -> i32 {
        let (mut registers, mut at) = ([0_i32; 7], 0_usize);
        loop {
            let Insn { code, registers: used, offset, immediate } = program[at];
            let (to, from) = (usize::from(used & 15), usize::from(used >> 4));
            at += 1;
            match code {
                LOAD_WORD => registers[to] = context[usize::try_from(offset).unwrap() / 4],
                SET => registers[to] = immediate,
                COPY => registers[to] = registers[from],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] = (registers[to].cast_unsigned() >> immediate).cast_signed(),
                JUMP_UNLESS if registers[to] != immediate => at += usize::try_from(offset).unwrap(),
                JUMP_UNLESS => {}
                EXIT => return registers[0],
                _ => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn what_is_listed_opens_as_listed_and_nothing_else_does() {
        let rule =
            |block, major, minor, read, write| DeviceRule { block, device: DeviceNumber { major, minor }, read, write };
        let program = of_devices(&[rule(true, 7, 3, true, false), rule(false, 10, 237, true, true)]);
        let opens = |kind: i32, access: i32, major, minor| run(&program, [access << 16 | kind, major, minor]) == 1;
        assert!(opens(BLOCK, READ, 7, 3) && !opens(BLOCK, WRITE, 7, 3) && !opens(BLOCK, READ | WRITE, 7, 3));
        assert!(!opens(CHARACTER, READ, 7, 3) && !opens(BLOCK, READ, 7, 4) && !opens(BLOCK, READ, 8, 3));
        assert!(opens(CHARACTER, READ | WRITE, 10, 237) && !opens(CHARACTER, 1, 10, 237), "no mknod");
        for standard in STANDARD_DEVICES {
            let (major, minor) = (standard.device.major.cast_signed(), standard.device.minor.cast_signed());
            assert!(opens(CHARACTER, READ | WRITE, major, minor) && !opens(BLOCK, READ, major, minor));
        }
    }
}

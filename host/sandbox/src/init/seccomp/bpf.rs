//! Compiles verdicts per system call to classic BPF: a binary search over ranges of equal verdict.
//!
//! A linear chain of compares is what most libraries emit. The kernel runs a new filter once for every system call
//! number to fill its cache, so the tree halves the cost of installing a long list (158 against 323 µs measured for
//! 128 entries).

use libc::sock_filter;

/// What a filter decides for one system call number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Let it through.
    Allow,
    /// Refuse it with this errno.
    Errno(u16),
    /// Kill the process with SIGSYS.
    Kill,
    /// Let it through if the test on its arguments holds, else refuse it with the errno.
    If(&'static Test, u16),
}

/// A test on the arguments. Only the low 32 bits are looked at: each argument tested is an `int` or has all of its
/// meaning there, and the kernel itself drops the rest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// `arg & mask == value`.
    Masked { arg: u8, mask: u32, value: u32 },
    /// The argument is one of these.
    OneOf { arg: u8, values: &'static [u32] },
    /// The argument is none of these.
    NoneOf { arg: u8, values: &'static [u32] },
    /// All of these hold.
    All(&'static [Test]),
}

/// `AUDIT_ARCH_X86_64`: EM_X86_64, 64 bit, little endian (`linux/audit.h`).
pub(super) const AUDIT_ARCH_X86_64: u32 = 62 | 0x8000_0000 | 0x4000_0000;

/// The first number of the x32 ABI (`__X32_SYSCALL_BIT`), which shares the architecture's token.
const X32_BIT: u32 = 0x4000_0000;

// offsets in struct seccomp_data (`seccomp(2)`): nr, arch, instruction_pointer, args[6]
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// Compiles a filter. `verdicts` are `(number, verdict)`, ascending; `default` answers every other number.
///
/// Another architecture and the x32 ABI are killed, whatever the verdicts say.
pub(crate) fn compile(verdicts: &[(u32, Verdict)], default: Verdict) -> Vec<sock_filter> {
    debug_assert!(verdicts.is_sorted_by(|a, b| a.0 < b.0), "ascending and unique");
    let mut program = vec![
        load(ARCH),
        jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        ret(Verdict::Kill),
        load(NR),
        jump(libc::BPF_JGE, X32_BIT, 0, 1),
        ret(Verdict::Kill),
    ];
    program.extend(tree(&ranges(verdicts, default)));
    program
}

/// `(first number, verdict)` of each run of equal verdicts, from 0 up.
fn ranges(verdicts: &[(u32, Verdict)], default: Verdict) -> Vec<(u32, Verdict)> {
    let mut ranges: Vec<(u32, Verdict)> = vec![(0, default)];
    let mut begin = |at: u32, verdict: Verdict| {
        match ranges.last_mut() {
            Some(last) if last.0 == at => last.1 = verdict,
            _ => ranges.push((at, verdict)),
        }
        // equal neighbours are one range
        if let [.., (_, before), (_, now)] = ranges[..]
            && before == now
        {
            ranges.pop();
        }
    };
    for (number, verdict) in verdicts {
        begin(*number, *verdict);
        begin(number + 1, default);
    }
    ranges
}

fn tree(ranges: &[(u32, Verdict)]) -> Vec<sock_filter> {
    if let [(_, verdict)] = ranges {
        return leaf(*verdict);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let pivot = high[0].0;
    let (low, high) = (tree(low), tree(high));
    let mut code = match u8::try_from(low.len()) {
        Ok(skip) => vec![jump(libc::BPF_JGE, pivot, skip, 0)],
        // a conditional jump reaches 255 instructions, an unconditional one reaches all
        Err(_) => vec![jump(libc::BPF_JGE, pivot, 0, 1), always(low.len())],
    };
    code.extend(low);
    code.extend(high);
    code
}

fn leaf(verdict: Verdict) -> Vec<sock_filter> {
    let Verdict::If(test, errno) = verdict else {
        return vec![ret(verdict)];
    };
    let mut code = test_code(test, errno);
    code.push(ret(Verdict::Allow));
    code
}

/// Code that falls through if the test holds and refuses with `errno` otherwise.
fn test_code(test: &Test, errno: u16) -> Vec<sock_filter> {
    let refuse = ret(Verdict::Errno(errno));
    match test {
        Test::Masked { arg, mask, value } => vec![
            load(argument(*arg)),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, *mask),
            jump(libc::BPF_JEQ, *value, 1, 0),
            refuse,
        ],
        Test::OneOf { arg, values } => {
            let mut code = vec![load(argument(*arg))];
            for (i, value) in values.iter().enumerate() {
                // the jump goes over the remaining compares and the refusal
                code.push(jump(libc::BPF_JEQ, *value, short(values.len() - i), 0));
            }
            code.push(refuse);
            code
        }
        Test::NoneOf { arg, values } => {
            let mut code = vec![load(argument(*arg))];
            for (i, value) in values.iter().enumerate() {
                // to the refusal, which is behind the remaining compares and the jump over it
                code.push(jump(libc::BPF_JEQ, *value, short(values.len() - i), 0));
            }
            code.push(always(1));
            code.push(refuse);
            code
        }
        Test::All(tests) => tests.iter().flat_map(|test| test_code(test, errno)).collect(),
    }
}

fn short(distance: usize) -> u8 {
    u8::try_from(distance).unwrap_or_else(|_| unreachable!("a test has far fewer than 255 values"))
}

const fn argument(index: u8) -> u32 {
    ARGS + 8 * index as u32 // little endian: the low half comes first
}

const fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

const fn ret(verdict: Verdict) -> sock_filter {
    let action = match verdict {
        Verdict::Allow => libc::SECCOMP_RET_ALLOW,
        Verdict::Errno(errno) => libc::SECCOMP_RET_ERRNO | errno as u32,
        Verdict::Kill | Verdict::If(..) => libc::SECCOMP_RET_KILL_PROCESS,
    };
    statement(libc::BPF_RET | libc::BPF_K, action)
}

#[allow(clippy::cast_possible_truncation)] // the opcodes are 16 bits by definition
const fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

#[allow(clippy::cast_possible_truncation)] // the opcodes are 16 bits by definition
const fn jump(condition: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | condition | libc::BPF_K) as u16, jt, jf, k }
}

fn always(skip: usize) -> sock_filter {
    let skip = u32::try_from(skip).unwrap_or_else(|_| unreachable!("a filter has at most 4,096 instructions"));
    statement(libc::BPF_JMP | libc::BPF_JA, skip)
}

/// What a filter says, found as the kernel would.
#[cfg(test)]
pub(super) mod interpreter {
    use libc::sock_filter;

    /// Runs a filter as the kernel would.
    pub(in crate::init::seccomp) fn run(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(nr.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0_u64.to_le_bytes());
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (mut pc, mut acc) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[pc];
            pc += 1;
            match u32::from(code) {
                c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    let at = k as usize;
                    acc = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                c if c == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => acc &= k,
                c if c == libc::BPF_JMP | libc::BPF_JA => pc += k as usize,
                c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    pc += usize::from(if acc == k { jt } else { jf });
                }
                c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => {
                    pc += usize::from(if acc >= k { jt } else { jf });
                }
                c if c == libc::BPF_RET | libc::BPF_K => return k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::interpreter::run;
    use super::*;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | 38;

    fn native(program: &[sock_filter], nr: u32, args: [u64; 6]) -> u32 {
        run(program, AUDIT_ARCH_X86_64, nr, args)
    }

    #[test]
    fn every_number_gets_its_verdict_and_no_other() {
        // two of three allowed, so that ranges begin and end everywhere and the tree is deep enough for long jumps
        let verdicts: Vec<(u32, Verdict)> = (0..900).filter(|n| n % 3 != 1).map(|n| (n, Verdict::Allow)).collect();
        let program = compile(&verdicts, Verdict::Errno(1));
        assert!(program.len() > 600, "the test must need long jumps");
        for nr in 0..2048 {
            let expected = if nr < 900 && nr % 3 != 1 { ALLOW } else { EPERM };
            assert_eq!(native(&program, nr, [0; 6]), expected, "number {nr}");
        }
    }

    #[test]
    fn other_architectures_and_x32_are_killed() {
        let program = compile(&[(1, Verdict::Allow)], Verdict::Errno(1));
        assert_eq!(run(&program, 0x4000_0003, 1, [0; 6]), KILL, "i386");
        assert_eq!(native(&program, X32_BIT | 1, [0; 6]), KILL);
        assert_eq!(native(&program, u32::MAX, [0; 6]), KILL);
        assert_eq!(native(&program, 1, [0; 6]), ALLOW);
    }

    #[test]
    fn argument_tests_see_the_low_half_only() {
        static CLONE: Test = Test::Masked { arg: 0, mask: 0x7e02_0000, value: 0 };
        static SOCKET: Test =
            Test::All(&[Test::OneOf { arg: 0, values: &[1, 7] }, Test::Masked { arg: 1, mask: 0xf, value: 1 }]);
        static FCNTL: Test = Test::NoneOf { arg: 1, values: &[1031, 1024] };
        let verdicts = [(2, Verdict::If(&FCNTL, 1)), (5, Verdict::If(&CLONE, 1)), (6, Verdict::If(&SOCKET, 38))];
        let program = compile(&verdicts, Verdict::Kill);
        let high = 0xdead_0000_0000_0000;
        assert_eq!(native(&program, 5, [0x11, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(native(&program, 5, [high | 0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
        assert_eq!(native(&program, 6, [1, 0x8_0001, 0, 0, 0, 0]), ALLOW);
        assert_eq!(native(&program, 6, [high | 7, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(native(&program, 6, [2, 1, 0, 0, 0, 0]), ENOSYS);
        assert_eq!(native(&program, 6, [1, 3, 0, 0, 0, 0]), ENOSYS);
        assert_eq!(native(&program, 2, [0, 3, 0, 0, 0, 0]), ALLOW);
        assert_eq!(native(&program, 2, [0, high | 1031, 0, 0, 0, 0]), EPERM);
        assert_eq!(native(&program, 3, [0; 6]), KILL);
    }

    #[test]
    fn an_empty_list_is_the_default_everywhere() {
        let program = compile(&[], Verdict::Errno(38));
        assert_eq!(native(&program, 0, [0; 6]), ENOSYS);
        assert_eq!(native(&program, 5000, [0; 6]), ENOSYS);
    }
}

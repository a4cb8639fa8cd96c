//! What an upload is, told from its bytes alone: never from its name or its `Content-Type`.

use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};

/// What kind of artifact some bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A static or static-pie program for x86-64 Linux.
    Elf,
    /// A core WebAssembly module.
    Module,
    /// A WebAssembly component.
    Component,
    /// A module or a component in the text format.
    Text,
}

/// The bytes are nothing that can be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// No bytes at all.
    #[error("the artifact is empty")]
    Empty,
    /// Not one of the formats.
    #[error(
        "not a format that can be run: {0}. Upload an ELF program for x86-64 Linux, a WebAssembly module or component, or WebAssembly text"
    )]
    Unknown(&'static str),
    /// An ELF file that cannot be run here.
    #[error("ELF: {0}")]
    Elf(String),
}

/// How much of an artifact is looked at to tell what it is. An ELF file's headers are then read from where they are.
const HEAD: u64 = 64 * 1024;

/// Tells what `data` is, and of an ELF program whether it can be run here. Reads headers only, never the whole.
///
/// # Errors
/// See [`FormatError`]; the message says what to do about it.
pub fn inspect<'data, R: ReadRef<'data>>(data: R) -> Result<Format, FormatError> {
    let len = data.len().unwrap_or(0).min(HEAD);
    let head = data.read_bytes_at(0, len).unwrap_or_default();
    match head {
        [] => Err(FormatError::Empty),
        [0x7f, b'E', b'L', b'F', ..] => inspect_elf(head, data).map(|()| Format::Elf),
        [0, b'a', b's', b'm', ..] if is_component(head) => Ok(Format::Component),
        [0, b'a', b's', b'm', ..] if head.len() >= 8 => Ok(Format::Module),
        [0, b'a', b's', b'm', ..] => {
            Err(FormatError::Unknown("a WebAssembly module that ends within its first 8 bytes"))
        }
        _ if is_wasm_text(head) => Ok(Format::Text),
        _ => Err(FormatError::Unknown(describe(head))),
    }
}

/// Whether WebAssembly in binary form is a component: the second half of the version word is the layer, 0 for modules.
pub(crate) fn is_component(wasm: &[u8]) -> bool {
    wasm.get(6..8) == Some(&[1, 0])
}

/// Words for common mistakes.
fn describe(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'#', b'!', ..] => "a script; there is no interpreter in a sandbox",
        [b'M', b'Z', ..] => "a Windows program",
        [0xcf, 0xfa, 0xed, 0xfe, ..] | [0xca, 0xfe, 0xba, 0xbe, ..] => "a macOS program or a Java class",
        [0x1f, 0x8b, ..] => "a gzip archive",
        [b'P', b'K', 3, 4, ..] => "a zip archive",
        _ if !utf8_prefix(bytes).is_empty() => "text",
        _ => "unknown binary data",
    }
}

/// Whether the text begins as WebAssembly text must: white space and comments, then a parenthesis.
fn is_wasm_text(bytes: &[u8]) -> bool {
    let mut text = utf8_prefix(bytes);
    loop {
        text = text.trim_start();
        if let Some(rest) = text.strip_prefix(";;") {
            let Some((_, rest)) = rest.split_once('\n') else {
                return false;
            };
            text = rest;
        } else if text.starts_with("(;") {
            let Some(end) = end_of_block_comment(text) else {
                return false;
            };
            text = &text[end..];
        } else {
            return text.starts_with('(');
        }
    }
}

/// The text in `bytes`, which may break off within a character; empty if it is no text.
fn utf8_prefix(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
        Err(_) => "",
    }
}

/// Where the (nestable) block comment at the start of `text` ends.
fn end_of_block_comment(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut depth, mut at) = (0_usize, 0);
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"(;" => {
                depth += 1;
                at += 2;
            }
            b";)" => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => at += 1,
        }
    }
    None
}

type Header = elf::FileHeader64<Endianness>;

fn inspect_elf<'data, R: ReadRef<'data>>(head: &[u8], data: R) -> Result<(), FormatError> {
    let refuse = |why: String| Err(FormatError::Elf(why));
    if let [_, _, _, _, class, encoding, _, abi, ..] = head {
        if elf::FileClass(*class) != elf::ELFCLASS64 {
            return refuse("a 32-bit program; build it for x86_64".into());
        }
        if elf::DataEncoding(*encoding) != elf::ELFDATA2LSB {
            return refuse("big-endian; build it for x86_64".into());
        }
        // wasmtime's compiled modules are ELF files with an ABI of their own: they must never get near an exec
        if ![elf::ELFOSABI_SYSV, elf::ELFOSABI_GNU].contains(&elf::OsAbi(*abi)) {
            return refuse(format!("made for operating system ABI {abi}, not for Linux"));
        }
    }
    let truncated = || FormatError::Elf("truncated or damaged: its headers reach beyond its end".into());
    let header = Header::parse(data).map_err(|_| truncated())?;
    let endian = header.endian().map_err(|_| truncated())?;
    let machine = header.e_machine(endian);
    if machine != elf::EM_X86_64 {
        return refuse(format!("built for {}, not for x86-64", machine_name(machine)));
    }
    match header.e_type(endian) {
        elf::ET_EXEC | elf::ET_DYN => {}
        elf::ET_REL => return refuse("an object file that has not been linked".into()),
        elf::ET_CORE => return refuse("a core dump".into()),
        other => return refuse(format!("of unknown type {}", other.0)),
    }
    let segments = header.program_headers(endian, data).map_err(|_| truncated())?;
    for segment in segments {
        let (start, size) = segment.file_range(endian);
        if segment.p_type(endian) == elf::PT_LOAD {
            if !within(data, start, size) {
                return Err(truncated());
            }
            if !mappable(segment, endian) {
                return refuse("damaged: a segment that no kernel can map".into());
            }
        }
        if segment.p_type(endian) == elf::PT_INTERP && size > MAX_INTERPRETER {
            return refuse("damaged: the name of its interpreter is longer than any path".into());
        }
        if let Some(interpreter) = segment.interpreter(endian, data).map_err(|_| truncated())? {
            let name = shown(interpreter);
            return refuse(format!(
                "dynamically linked: it needs the interpreter `{name}`, and a sandbox has no libraries. Link it statically (Rust: `-C target-feature=+crt-static`, C: `-static`, Go: `CGO_ENABLED=0`)"
            ));
        }
    }
    let entry = header.e_entry(endian);
    let executable = segments.iter().any(|segment| {
        let (start, size) = (segment.p_vaddr(endian), segment.p_memsz(endian));
        segment.p_type(endian) == elf::PT_LOAD
            && segment.p_flags(endian).contains(elf::PF_X)
            && entry.checked_sub(start).is_some_and(|offset| offset < size)
    });
    if !executable {
        return refuse("not a program: its entry point lies in no executable segment (a shared library?)".into());
    }
    Ok(())
}

/// The longest name of an interpreter that the kernel takes (`PATH_MAX`). Read whole, so it must have an end.
const MAX_INTERPRETER: u64 = 4096;

/// A name from the file, in words that do no harm in an answer or a log, and not many of them.
fn shown(name: &[u8]) -> String {
    const MOST: usize = 100;
    let cut = if name.len() > MOST { "…" } else { "" };
    format!("{}{cut}", name[..name.len().min(MOST)].escape_ascii())
}

/// Whether the kernel can map a segment: `execve` itself finds out too late to say so, and ends the process.
fn mappable(segment: &elf::ProgramHeader64<Endianness>, endian: Endianness) -> bool {
    const PAGE: u64 = 4096;
    const END: u64 = (1 << 47) - PAGE; // the kernel's TASK_SIZE_MAX with four levels of page tables
    let (address, (offset, in_file)) = (segment.p_vaddr(endian), segment.file_range(endian));
    let in_memory = segment.p_memsz(endian);
    in_file <= in_memory
        && (in_file == 0 || address % PAGE == offset % PAGE)
        && address.checked_add(in_memory).is_some_and(|end| end <= END)
}

/// Whether the file holds `size` bytes from `start` on.
fn within<'data, R: ReadRef<'data>>(data: R, start: u64, size: u64) -> bool {
    data.len().is_ok_and(|len| start.checked_add(size).is_some_and(|end| end <= len))
}

fn machine_name(machine: elf::Machine) -> String {
    match machine {
        elf::EM_AARCH64 => "aarch64".into(),
        elf::EM_ARM => "arm".into(),
        elf::EM_386 => "i386".into(),
        elf::EM_RISCV => "riscv".into(),
        elf::EM_PPC64 => "ppc64".into(),
        elf::EM_S390 => "s390x".into(),
        elf::EM_MIPS => "mips".into(),
        other => format!("machine {}", other.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program header, and the smallest static program around it.
    struct Elf {
        kind: elf::FileType,
        machine: elf::Machine,
        class: elf::FileClass,
        abi: u8,
        entry: u64,
        address: u64,
        segments: Vec<(elf::ProgramType, elf::ProgramFlags, u64, u64)>, // type, flags, offset, size
        tail: Vec<u8>,
    }

    impl Elf {
        fn program() -> Self {
            Self {
                kind: elf::ET_EXEC,
                machine: elf::EM_X86_64,
                class: elf::ELFCLASS64,
                abi: 0,
                entry: 0x40_0080,
                address: 0x40_0000,
                segments: vec![(elf::PT_LOAD, elf::PF_R | elf::PF_X, 0, 0x100)],
                tail: vec![0; 0x100],
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = vec![0x7f, b'E', b'L', b'F', self.class.0, 1, 1, self.abi, 0, 0, 0, 0, 0, 0, 0, 0];
            out.extend(self.kind.0.to_le_bytes());
            out.extend(self.machine.0.to_le_bytes());
            out.extend(1_u32.to_le_bytes());
            out.extend(self.entry.to_le_bytes());
            out.extend(64_u64.to_le_bytes()); // program headers right behind
            out.extend(0_u64.to_le_bytes());
            out.extend(0_u32.to_le_bytes());
            for half in [64_u16, 56, u16::try_from(self.segments.len()).unwrap(), 64, 0, 0] {
                out.extend(half.to_le_bytes());
            }
            for (kind, flags, offset, size) in &self.segments {
                out.extend(kind.0.to_le_bytes());
                out.extend(flags.0.to_le_bytes());
                let address = offset.wrapping_add(self.address);
                for word in [*offset, address, address, *size, *size, 0x1000] {
                    out.extend(word.to_le_bytes());
                }
            }
            out.extend(&self.tail);
            out
        }

        fn refusal(&self) -> String {
            inspect(&self.bytes()[..]).unwrap_err().to_string()
        }
    }

    #[test]
    fn a_static_program_passes() {
        assert_eq!(inspect(&Elf::program().bytes()[..]), Ok(Format::Elf));
        assert_eq!(inspect(&Elf { kind: elf::ET_DYN, ..Elf::program() }.bytes()[..]), Ok(Format::Elf), "static-pie");
    }

    #[test]
    fn a_dynamic_program_is_refused_with_its_interpreter() {
        let mut dynamic = Elf::program();
        let at = 64 + 2 * 56;
        dynamic.segments.push((elf::PT_INTERP, elf::PF_R, at, 28));
        dynamic.tail = b"/lib64/ld-linux-x86-64.so.2\0".to_vec();
        dynamic.tail.resize(0x100, 0);
        assert!(dynamic.refusal().contains("`/lib64/ld-linux-x86-64.so.2`"), "{}", dynamic.refusal());
    }

    #[test]
    fn an_interpreter_of_any_length_is_refused_in_few_words() {
        let at = 64 + 2 * 56;
        for (len, word) in [(4096, "dynamically linked"), (4097, "longer than any path"), (1 << 20, "longer than")] {
            let mut dynamic = Elf::program();
            dynamic.segments.push((elf::PT_INTERP, elf::PF_R, at, len));
            dynamic.tail = vec![0xff; usize::try_from(len).unwrap() - 1];
            dynamic.tail.push(0);
            let refusal = dynamic.refusal();
            assert!(refusal.contains(word) && refusal.len() < 1024, "{} bytes: {refusal:.200}", refusal.len());
        }
    }

    #[test]
    fn what_cannot_run_here_is_refused_in_words() {
        let cases = [
            (Elf { machine: elf::EM_AARCH64, ..Elf::program() }, "aarch64"),
            (Elf { class: elf::ELFCLASS32, ..Elf::program() }, "32-bit"),
            (Elf { kind: elf::ET_REL, ..Elf::program() }, "object file"),
            (Elf { kind: elf::ET_CORE, ..Elf::program() }, "core dump"),
            (Elf { abi: 200, ..Elf::program() }, "ABI 200"),
            (Elf { entry: 0, ..Elf::program() }, "entry point"),
            (Elf { address: 0x40_0008, ..Elf::program() }, "no kernel can map"),
            (Elf { address: u64::MAX << 47, ..Elf::program() }, "no kernel can map"),
            (Elf { segments: vec![(elf::PT_LOAD, elf::PF_R, 0, 0x100)], ..Elf::program() }, "entry point"),
            (
                Elf { segments: vec![(elf::PT_LOAD, elf::PF_R | elf::PF_X, 0, 0x10_0000)], ..Elf::program() },
                "truncated",
            ),
            (Elf { segments: vec![(elf::PT_LOAD, elf::PF_R | elf::PF_X, u64::MAX, 2)], ..Elf::program() }, "truncated"),
        ];
        for (elf, word) in cases {
            assert!(elf.refusal().contains(word), "{word}: {}", elf.refusal());
        }
    }

    #[test]
    fn every_truncation_is_an_error_and_no_panic() {
        let whole = Elf::program().bytes();
        let needed = 0x100; // what its one segment reaches to
        for len in 0..whole.len() {
            assert_eq!(inspect(&whole[..len]).is_ok(), len >= needed, "{len} bytes");
        }
    }

    #[test]
    fn wasm_is_told_from_its_first_bytes() {
        assert_eq!(inspect(&b"\0asm\x01\0\0\0"[..]), Ok(Format::Module));
        assert_eq!(inspect(&b"\0asm\x0d\0\x01\0rest"[..]), Ok(Format::Component));
        assert!(matches!(inspect(&b"\0asm\x01"[..]), Err(FormatError::Unknown(_))));
        for text in ["(module)", " \n;; hi\n(; a (; b ;) ;)(func)", "(component)"] {
            assert_eq!(inspect(text.as_bytes()), Ok(Format::Text), "{text}");
        }
    }

    #[test]
    fn other_things_are_called_by_their_name() {
        assert_eq!(inspect(&b""[..]), Err(FormatError::Empty));
        let cases: [(&[u8], &str); 6] = [
            (b"#!/bin/sh\n", "script"),
            (b"hello", "text"),
            (b";; only a comment", "text"),
            (b"(; never closed", "text"),
            (b"PK\x03\x04", "zip"),
            (b"\xff\xfe\x00", "unknown binary"),
        ];
        for (bytes, word) in cases {
            let message = inspect(bytes).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}

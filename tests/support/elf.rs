//! ELF programs made for one test each: a header, segments, and a few instructions that end well.

/// A program whose only instructions are `exit_group(0)`.
pub struct Elf {
    pub segments: Vec<Segment>,
    /// Where it starts, if not at its instructions.
    pub entry: Option<u64>,
    /// Bytes of the file at least.
    pub bytes: usize,
}

/// A row of the program header table.
#[derive(Clone, Copy)]
pub struct Segment {
    pub kind: u32,
    pub flags: u32,
    pub offset: u64,
    pub address: u64,
    pub in_file: u64,
    pub in_memory: u64,
}

impl Segment {
    /// All of the file's first page, to be run.
    pub const CODE: Self =
        Self { kind: LOAD, flags: READ | EXECUTE, offset: 0, address: BASE, in_file: PAGE, in_memory: PAGE };

    /// One that the kernel takes no notice of.
    pub const NOTE: Self = Self { kind: 4, flags: READ, offset: 0, address: 0, in_file: 0, in_memory: 0 };
}

const LOAD: u32 = 1;
const EXECUTE: u32 = 1;
const READ: u32 = 4;
const BASE: u64 = 0x40_0000;
const PAGE: u64 = 4096;

impl Elf {
    pub fn program() -> Self {
        Self { segments: vec![Segment::CODE], entry: None, bytes: 4096 }
    }

    pub fn build(&self) -> Vec<u8> {
        let headers = 64 + 56 * self.segments.len();
        let entry = self.entry.unwrap_or(self.segments[0].address + headers as u64);
        let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec(); // ET_EXEC, x86-64
        out.extend([entry, 64, 0].into_iter().flat_map(u64::to_le_bytes));
        let count = u16::try_from(self.segments.len()).unwrap();
        out.extend([0, 0, 64, 56, count, 64, 0, 0].into_iter().flat_map(u16::to_le_bytes));
        for Segment { kind, flags, offset, address, in_file, in_memory } in &self.segments {
            out.extend([*kind, *flags].into_iter().flat_map(u32::to_le_bytes));
            out.extend(
                [*offset, *address, *address, *in_file, *in_memory, PAGE].into_iter().flat_map(u64::to_le_bytes),
            );
        }
        out.extend(b"\x31\xff\xb8\xe7\0\0\0\x0f\x05"); // xor edi, edi; mov eax, SYS_exit_group; syscall
        out.resize(self.bytes.max(out.len()), 0);
        out
    }
}

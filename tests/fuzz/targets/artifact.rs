//! What an upload is, told from its bytes. The server itself does this, to whatever a tenant sends.
#![no_main]

use std::io::Cursor;

use holm_runtime::artifact::{Format, FormatError, inspect};
use libfuzzer_sys::fuzz_target;
use object::ReadCache;

/// The longest that a refusal may be: it goes into an answer and a log.
const LONGEST: usize = 1024;

fuzz_target!(|bytes: &[u8]| {
    let told = inspect(bytes);
    assert_eq!(told, inspect(&ReadCache::new(Cursor::new(bytes))), "a file is told as its bytes are");
    match told {
        Ok(Format::Elf) => {
            assert!(bytes.starts_with(b"\x7fELF\x02\x01"));
            assert!([0, 3].contains(&bytes[7]), "only programs for Linux: never a compiled module");
            assert!(is_program(bytes));
        }
        Ok(Format::Module) => assert!(bytes.starts_with(b"\0asm") && bytes.get(6..8) != Some(&[1, 0])),
        Ok(Format::Component) => assert!(bytes.starts_with(b"\0asm") && bytes.get(6..8) == Some(&[1, 0])),
        Ok(Format::Text) => assert!(bytes.contains(&b'(')),
        Err(error) => {
            assert_eq!(error == FormatError::Empty, bytes.is_empty());
            let text = error.to_string();
            assert!(text.len() <= LONGEST, "{} bytes of words: {text:.100}", text.len());
        }
    }
});

/// A second opinion, read by hand: for x86-64, no interpreter, and the entry point within an executable segment.
fn is_program(elf: &[u8]) -> bool {
    let half = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let segments = (0..usize::from(half(56))).map(|i| usize::try_from(long(32)).unwrap() + 56 * i);
    let entry = long(24);
    let holds_entry = |at: usize| {
        word(at) == 1 && word(at + 4) & 1 == 1 && (long(at + 16)..long(at + 16) + long(at + 40)).contains(&entry)
    };
    half(18) == 62 && segments.clone().all(|at| word(at) != 3) && segments.clone().any(holds_entry)
}

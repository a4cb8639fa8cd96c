//! What server and sandbox say to each other about one job, over the sandbox's channel.

use serde::{Deserialize, Serialize};

/// The longest text in a [`Report`], in bytes. Longer ones are cut: they are for people.
pub const MAX_TEXT: usize = 4096;

/// What a job is to be run with. Its standard streams come beside it, as descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    /// The arguments, the program's own name first.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Fuel for WebAssembly; native programs have no use for it.
    pub fuel: u64,
    /// What the standard streams carry.
    pub interface: Interface,
}

/// How a guest is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Interface {
    /// Once, from standard input to standard output.
    #[default]
    Command,
    /// With one HTTP/1.1 request that comes in on standard input; the response goes out on standard output, and what
    /// the guest prints on standard error.
    Http,
}

/// The interfaces that an artifact can be called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exports {
    /// It is a command.
    pub command: bool,
    /// It handles HTTP requests.
    pub http: bool,
}

impl Exports {
    /// Of a native program, or of a core module.
    pub const COMMAND: Self = Self { command: true, http: false };

    /// Whether it can be called by `interface`.
    #[must_use]
    pub fn has(self, interface: Interface) -> bool {
        match interface {
            Interface::Command => self.command,
            Interface::Http => self.http,
        }
    }
}

/// What a sandbox says at its end. The process that sends it has run a stranger's code: the server believes it about
/// nobody but that stranger, and believes the kernel first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The artifact cannot be run after all.
    NotRunnable(String),
    /// WebAssembly ended.
    Wasm {
        /// How.
        end: WasmEnd,
        /// Fuel used, up to the point of a trap too.
        fuel_used: u64,
    },
    /// The module is compiled and links; the compiled form has been written to standard output.
    Compiled {
        /// Its length, to tell a whole artifact from a cut one.
        bytes: u64,
        /// How it can be called.
        exports: Exports,
    },
    /// The module is not valid, does not link, or cannot be compiled: what, and where in the module.
    Invalid(String),
}

/// How a WebAssembly guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WasmEnd {
    /// `_start`, `run` or `handle` returned, or it called for its exit.
    Exited(i32),
    /// It trapped.
    Trapped {
        /// The engine's code, in snake case: `unreachable_code_reached`, `stack_overflow`…
        code: String,
        /// The guest's stack, innermost frame first.
        backtrace: String,
    },
    /// It used up its fuel.
    OutOfFuel,
    /// It grew its memory beyond the limit.
    OutOfMemory {
        /// The size that it asked for, in bytes.
        asked: u64,
    },
}

/// Cuts `text` to at most [`MAX_TEXT`] bytes, at a character's boundary.
#[must_use]
pub fn short(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(short("abc".into()), "abc");
        let cut = short("ä".repeat(5000));
        assert!(cut.len() <= MAX_TEXT && cut.ends_with("ä…"));
    }
}

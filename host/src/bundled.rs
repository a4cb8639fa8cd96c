//! This repository's own plugins, carried in the program: what the demo runs.

/// A plugin, ready to be uploaded.
#[derive(Clone, Copy, Debug)]
pub struct Bundled {
    /// Its name.
    pub name: &'static str,
    /// Its bytes.
    pub artifact: &'static [u8],
}

macro_rules! native {
    ($name:literal) => {
        include_bytes!(concat!(env!("BUNDLED_PLUGINS"), "/", $name))
    };
}

macro_rules! wasm {
    ($name:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../plugins/", $name, "/", $name, ".wasm"))
    };
}

/// `word-count` as a native program and as WebAssembly, from the same source.
pub const WORD_COUNT_NATIVE: Bundled = Bundled { name: "word-count", artifact: native!("word-count") };
/// See [`WORD_COUNT_NATIVE`].
pub const WORD_COUNT_WASM: Bundled = Bundled { name: "word-count-wasm", artifact: wasm!("word-count") };
/// `echo` as a native program and as WebAssembly.
pub const ECHO_NATIVE: Bundled = Bundled { name: "echo", artifact: native!("echo") };
/// See [`ECHO_NATIVE`].
pub const ECHO_WASM: Bundled = Bundled { name: "echo-wasm", artifact: wasm!("echo") };
/// Answers HTTP requests.
pub const HTTP_HELLO: Bundled = Bundled { name: "http-hello", artifact: wasm!("http-hello") };
/// The attacker.
pub const PROBE: Bundled = Bundled { name: "probe", artifact: native!("probe") };

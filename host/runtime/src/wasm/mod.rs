//! WebAssembly: one engine configuration for compiling and running, WASI preview 1 for core modules, WASI 0.2
//! for components.

mod answer;
mod compile;
mod engine;
mod guest;
mod http;
mod load;
mod run;
mod stdio;

pub use self::compile::compile;
pub use self::engine::{EngineError, fingerprint};
pub use self::run::{Loaded, load};

//! wasm_plugins

//! An upload as a form, and the manifest in it. The input is a byte for the size of the chunks in which the body comes,
//! one for the longest artifact, a `Content-Type` line, and the body.
#![no_main]

#[allow(dead_code)]
#[path = "../../../host/src/server/form.rs"]
mod form;
#[allow(dead_code)]
#[path = "../../../host/src/limit/mod.rs"]
mod limit;
#[allow(dead_code)]
#[path = "../../../host/src/plugin/settings.rs"]
mod settings;

use std::io;

use bytes::Bytes;
use form::{Form, FormError, Part};
use futures_util::{FutureExt, StreamExt, stream};
use holm_runtime::invocation::Exports;
use libfuzzer_sys::fuzz_target;
use limit::{Maximums, Runtime};
use settings::PluginSettings;

fuzz_target!(|bytes: &[u8]| {
    let [chunk, most, rest @ ..] = bytes else { return };
    let Some(line) = rest.iter().position(|byte| *byte == b'\n') else { return };
    let Ok(content_type) = std::str::from_utf8(&rest[..line]) else { return };
    let (most, body) = (64 * u64::from(*most), &rest[line + 1..]);

    let whole = upload(content_type, most, body, body.len());
    let parted = upload(content_type, most, body, usize::from(*chunk));
    match (&whole, &parted) {
        (Ok(whole), Ok(parted)) => assert_eq!(whole, parted, "how a body is cut is not what it says"),
        (Err(a), Err(b)) => assert!(!a.to_string().is_empty() && !b.to_string().is_empty()),
        // sizes are counted as the bytes come, so a part may be refused before or after the end is found
        _ => assert!(body.len() as u64 > most, "{whole:?} and {parted:?}"),
    }
    if let Ok((Some(artifact), manifest)) = whole {
        assert!(artifact.len() as u64 <= most && artifact.len() <= body.len());
        manifest.iter().for_each(|manifest| check(manifest));
    }
});

type Parts = (Option<Vec<u8>>, Option<Bytes>);

/// Takes the parts of a body that comes in chunks of `chunk` bytes, as the route does.
fn upload(content_type: &str, most: u64, body: &[u8], chunk: usize) -> Result<Parts, FormError> {
    let chunks: Vec<io::Result<Bytes>> = body.chunks(chunk.max(1)).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    let mut form = Form::new(stream::iter(chunks), content_type, most)?;
    let (mut artifact, mut manifest) = (None, None);
    let read = async {
        while let Some(part) = form.next().await? {
            match part {
                Part::Artifact(mut field) => {
                    let received = artifact.insert(Vec::new());
                    while let Some(bytes) = field.next().await {
                        received.extend_from_slice(&bytes?);
                        if received.len() as u64 > most {
                            return Err(FormError::Parts); // stands for the route's own refusal
                        }
                    }
                }
                Part::Manifest(bytes) => assert!(manifest.replace(bytes).is_none(), "a second manifest"),
            }
        }
        Ok(())
    };
    read.now_or_never().expect("all of the body is there: nothing to wait for")?;
    Ok((artifact, manifest))
}

/// Reads and checks a manifest, as the route does.
fn check(manifest: &[u8]) {
    let Ok(settings) = serde_json::from_slice::<PluginSettings>(manifest) else { return };
    let again = serde_json::to_vec(&settings).expect("settings can be written");
    assert_eq!(serde_json::from_slice::<PluginSettings>(&again).expect("and read again"), settings);
    for runtime in [Runtime::Native, Runtime::Wasm] {
        match settings.check(&PluginSettings::default(), runtime, &Maximums::default()) {
            Ok(()) => {
                assert!(settings.args.iter().all(|arg| !arg.contains('\0')));
                assert!(settings.env.keys().all(|name| !name.starts_with("HOLM_") && !name.contains(['=', '\0'])));
                let header = settings.output_content_type.as_deref().unwrap_or_default();
                assert!(header.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{header:?} in a header");
                let _ = settings.interface_of(Exports::COMMAND);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

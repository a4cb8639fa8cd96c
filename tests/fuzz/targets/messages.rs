//! Packets between server, launcher, zygotes and sandboxes, taken from a socket as each end takes them. The input is a letter for
//! who reads, a digit for the number of descriptors that come along, and the packet.
#![no_main]

use std::fmt::Debug;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};

use holm_runtime::invocation::{Invocation, Report};
use holm_sandbox::fuzzing::{read_gate, read_opening, read_spawn, read_zygote};
use holm_sandbox::limits::Limits;
use holm_sandbox::protocol::{FromLauncher, Order, ToLauncher};
use holm_sandbox::wire::{MAX_PACKET, Packets, RecvError};
use holm_sandbox::workload::JobMessage;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|bytes: &[u8]| {
    let [reader, count @ b'0'..=b'9', packet @ ..] = bytes else { return };
    let before = lowest_free_fd();
    let descriptors = usize::from(count - b'0');
    match reader {
        b'l' => {
            if let Some(message) = read(packet, descriptors, ToLauncher::fds) {
                assert_eq!(message.fds(), descriptors);
                obey(&message);
            }
        }
        b's' => drop(read(packet, descriptors, |_: &FromLauncher| 0)),
        b'r' => drop(read(packet, descriptors, |_: &Report| 0)),
        b'j' => {
            let job = arrived(packet, descriptors).recv_into(&mut [0; MAX_PACKET], |_: &JobMessage| 3);
            if let Ok(job) = job {
                assert_eq!(job.fds.len(), 3);
                let invocation = postcard::from_bytes::<Invocation>(&job.value.payload);
                invocation.iter().for_each(again);
            }
        }
        b'g' => gate(packet, descriptors),
        b'o' => drop(read_opening(&arrived(packet, descriptors))),
        b'z' => drop(read_zygote(&arrived(packet, descriptors))),
        b'c' => drop(read_spawn(&arrived(packet, descriptors))),
        _ => {}
    }
    assert_eq!(lowest_free_fd(), before, "a descriptor is left");
});

/// What the launcher must see to before it acts on a message.
fn obey(message: &ToLauncher) {
    let name = |name: &str| {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        assert!((1..=63).contains(&name.len()) && name.bytes().all(legal) && !name.starts_with('-'), "{name:?}");
    };
    match message {
        ToLauncher::Configure(config) => name(config.instance.as_str()),
        ToLauncher::Kill(_) => {}
        ToLauncher::ForgetTenant(tenant) | ToLauncher::FreezeTenant { tenant, .. } => name(tenant.as_str()),
        ToLauncher::Order { order, .. } => match order {
            Order::Limit(limits) if limits.check().is_ok() => {
                assert!(Limits::MEMORY_BYTES.contains(&limits.memory_bytes) && Limits::PIDS.contains(&limits.pids));
                assert_eq!(limits.changed_at_start_only(limits), None);
            }
            Order::Freeze | Order::Thaw | Order::Limit(_) | Order::Measure | Order::List => {}
        },
        ToLauncher::ForgetProgram { tenant, program } => {
            name(tenant.as_str());
            name(program.as_str());
        }
        ToLauncher::SetCeiling { tenant, ceiling, .. } => {
            name(tenant.as_str());
            let _ = ceiling.check();
        }
        ToLauncher::Launch { spec, .. } => {
            name(spec.tenant.as_str());
            name(spec.program.as_str());
            if spec.check().is_ok() {
                let limits = &spec.limits;
                assert!(Limits::MEMORY_BYTES.contains(&limits.memory_bytes) && Limits::PIDS.contains(&limits.pids));
                assert!(Limits::TIME.contains(&limits.wall_time) && Limits::TIME.contains(&limits.cpu_time));
                assert_eq!(spec.ceiling.check(), Ok(()));
            }
        }
    }
}

/// Reads a packet as a `T`, which must survive being sent once more.
fn read<T>(packet: &[u8], descriptors: usize, expected: impl Fn(&T) -> usize) -> Option<T>
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let received = arrived(packet, descriptors).recv_into(&mut [0; MAX_PACKET], expected).ok()?;
    again(&received.value);
    Some(received.value)
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    let bytes = postcard::to_stdvec(value).expect("what was decoded can be encoded");
    assert_eq!(&postcard::from_bytes::<T>(&bytes).expect("and decoded again"), value);
}

/// What the launcher understands at a gate, it understands again.
fn gate(packet: &[u8], descriptors: usize) {
    let (echo, echoed) = Packets::pair().expect("a pair");
    if read_gate(arrived(packet, descriptors), echo).is_ok() {
        let (ours, _theirs) = Packets::pair().expect("a pair");
        let repeated = read_gate(echoed, ours);
        assert!(!matches!(repeated, Err(RecvError::Malformed | RecvError::Empty)), "{repeated:?}");
    }
}

/// A socket on which a packet waits, with so many descriptors.
fn arrived(packet: &[u8], descriptors: usize) -> Packets {
    let (here, there) = Packets::pair().expect("a pair");
    let null = File::open("/dev/null").expect("/dev/null");
    let fds = vec![null.as_raw_fd(); descriptors];
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let _ = sendmsg::<()>(there.as_fd().as_raw_fd(), &[IoSlice::new(packet)], control, MsgFlags::MSG_NOSIGNAL, None);
    here
}

/// The number that the next descriptor gets: higher than before if one has leaked.
fn lowest_free_fd() -> i32 {
    File::open("/dev/null").expect("/dev/null").as_raw_fd()
}

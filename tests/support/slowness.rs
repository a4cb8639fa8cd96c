//! How much slower than usual this machine is, as `TEST_SLOWNESS` says: in an emulated one what may be waited for is
//! multiplied by it. What must not happen before a time stays as it is.

use std::sync::LazyLock;
use std::time::Duration;

static FACTOR: LazyLock<u32> = LazyLock::new(|| match std::env::var("TEST_SLOWNESS") {
    Ok(text) => text.parse().ok().filter(|factor| *factor > 0).expect("TEST_SLOWNESS is a positive number"),
    Err(_) => 1,
});

/// The longest that may be waited on this machine for what takes at most `usual` elsewhere.
pub(crate) fn at_most(usual: Duration) -> Duration {
    usual * *FACTOR
}

/// Lets the calling thread measure times though others on this machine want its CPU, as far as it may. What it starts is
/// treated as ever.
#[allow(dead_code)] // by those who measure
pub(crate) fn wait_for_nobody() {
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call, which concerns this thread alone.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const first) };
}

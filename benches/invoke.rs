//! What a job costs over HTTP, one at a time: native, WebAssembly, and a function; cold and warm; against the raw floor and
//! against others that run a program in namespaces of its own.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measurement that cannot go on should say where

mod support;

use std::time::Duration;

use holm::bundled::HTTP_HELLO;
use support::figures::Figures;
use support::floor::{self, FLOOR, Floor};
use support::peers::Peer;
use support::proc;
use support::programs::{EMPTY_MODULE, empty_program};
use support::server::Server;
use support::times::{Times, interleave, print_table, ratio, rounds, timed};

fn main() {
    if std::env::args().nth(1).is_some_and(|word| word == FLOOR) {
        return floor::serve();
    }
    let mut floor = Floor::start();
    println!("\n{}. {}", proc::machine(), floor.words());
    let (cold, warm) = (started(&[("HOLM_PARKED_PER_PLUGIN", "0")]), started(&[]));
    let dir = tempfile::tempdir().unwrap();
    let mut peers = Peer::find(dir.path());
    let names = [
        "floor",
        "GET /healthz",
        "native job, cold",
        "native job, warm",
        "Wasm module job, cold",
        "Wasm module job, warm",
        "Wasm component by `/fn`, cold",
        "Wasm component by `/fn`, warm",
        "crun run",
        "runc run",
        "bwrap",
    ];
    let times = interleave(names, rounds(), || {
        let [crun, runc, bwrap] = &mut peers;
        [
            floor.once(),
            timed(|| cold.send("GET", "/healthz", "{}", b"")),
            timed(|| cold.job("native", "{}", b"")),
            timed(|| warm.job("native", "{}", b"")),
            timed(|| cold.job("module", "{}", b"")),
            timed(|| warm.job("module", "{}", b"")),
            timed(|| call(&cold)),
            timed(|| call(&warm)),
            run(crun),
            run(runc),
            run(bwrap),
        ]
    });
    tell(&times, &peers);
}

/// A server with the plugins.
fn started(settings: &[(&str, &str)]) -> Server {
    let server = Server::start(settings);
    server.upload("bench", "native", &empty_program());
    server.upload("bench", "module", EMPTY_MODULE.as_bytes());
    server.upload("bench", "hello", HTTP_HELLO.artifact);
    server
}

fn call(server: &Server) {
    server.send("GET", "/fn/bench/hello/", "{}", b"");
}

/// Zero if the peer is absent.
fn run(peer: &mut Result<Peer, String>) -> Duration {
    peer.as_mut().map_or(Duration::ZERO, |peer| timed(|| peer.run()))
}

fn tell(times: &[Times; 11], peers: &[Result<Peer, String>; 3]) {
    let mut figures = Figures::of_this_run();
    let (own, others) = times.split_at(8);
    let there = others.iter().zip(peers).filter(|(_, peer)| peer.is_ok()).map(|(times, _)| times);
    print_table("An empty job over HTTP, one at a time", own.iter().chain(there));
    let (cold, warm) = (times[2].p50(), times[3].p50());
    for ((times, peer), name) in others.iter().zip(peers).zip(["native-crun", "native-runc", "native-bwrap"]) {
        match peer {
            Ok(_) => figures.measured(name, ratio(cold, times.p50())),
            Err(reason) => figures.absent(name, reason),
        }
    }
    match &peers[0] {
        Ok(_) => figures.measured("warm-native-crun", ratio(warm, others[0].p50())),
        Err(reason) => figures.absent("warm-native-crun", reason),
    }
    figures.print();
}

//! A process of the bench's own program that does what it is told, line by line, and answers each.

use std::io::{BufRead, BufReader, Write, stdin};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub struct Obedient {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Obedient {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (orders, answers) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, orders, answers }
    }

    pub fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.hear()
    }

    pub fn tell(&mut self, order: &str) {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
    }

    pub fn hear(&mut self) -> String {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

impl Drop for Obedient {
    fn drop(&mut self) {
        // the end of its orders; what has gone wrong there has been told there
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// The other side: obeys until there are no more orders.
pub fn obey(mut order: impl FnMut(&str) -> String) {
    for line in stdin().lines() {
        println!("{}", order(&line.unwrap()));
    }
}

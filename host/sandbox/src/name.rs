//! [`Name`]: what tenants and plugins are called.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A tenant's or a plugin's name: `[a-z0-9][a-z0-9-]{0,62}`.
///
/// It becomes a directory name in cgroup hierarchies and a file name in a job's root, so the type, not its users,
/// makes sure that it can be neither `..` nor a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// The text is no [`Name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name is 1 to 63 characters of a-z, 0-9 and '-', and does not begin with '-'")]
pub struct NameError;

impl Name {
    /// The longest name.
    pub const MAX_LEN: usize = 63;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let ok = !text.is_empty() && text.len() <= Self::MAX_LEN && text.bytes().all(legal) && !text.starts_with('-');
        if ok { Ok(Self(text)) } else { Err(NameError) }
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::Name;

    proptest! {
        #[test]
        fn whatever_is_a_name_is_one_plain_component_of_a_path(text in "\\PC{0,3}|[a-z0-9./-]{0,70}") {
            if let Ok(name) = text.parse::<Name>() {
                let components: Vec<Component<'_>> = Path::new(name.as_str()).components().collect();
                prop_assert_eq!(components, [Component::Normal(text.as_ref())]);
                prop_assert!(name.as_str().len() <= Name::MAX_LEN);
            }
        }

        #[test]
        fn every_name_that_is_promised_is_one(text in "[a-z0-9][a-z0-9-]{0,62}") {
            let name: Name = text.parse().unwrap();
            prop_assert_eq!(name.as_str(), &text);
        }
    }

    #[test]
    fn names_are_safe_as_file_names() {
        for good in ["a", "0", "acme", "a-b", "a-", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".", "..", "a/b", "a_b", "A", "ä", "a b", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}

//! Keys: 256 random bits, shown once, stored as a hash, compared in constant time.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use holm_sandbox::name::Name;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{Tenant, TenantRow};

/// A key as its owner has it. Never stored, never logged.
pub struct Key(String);

/// What is stored of a key: its SHA-256. A key has 256 random bits, so nothing slower is needed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

/// A tenant's key, as it is listed.
#[derive(Clone, Debug)]
pub struct KeyInfo {
    /// Its id, by which it is deleted.
    pub id: Uuid,
    /// Whose it is.
    pub tenant: Name,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Key {
    /// Makes a new one.
    ///
    /// # Errors
    /// The kernel gives no random bytes.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("holm_{}", URL_SAFE_NO_PAD.encode(bytes))))
    }

    /// The key itself, for the one moment in which it is shown.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What to store.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

impl KeyHash {
    /// The hash of a presented key.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Reads a stored hash. `None` unless it is 32 bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }

    /// For the store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Compares in constant time.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(…)")
    }
}

/// The operator's key, of which the server keeps only the hash.
#[derive(Clone, Debug)]
pub struct OperatorKey(KeyHash);

/// A text that cannot be an operator key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an operator key is 32 or more visible ASCII characters")]
pub struct OperatorKeyError;

impl OperatorKey {
    /// The least length.
    pub const MIN_LEN: usize = 32;

    /// Takes any key of 32 or more visible ASCII characters.
    ///
    /// # Errors
    /// It is shorter, or has other characters.
    pub fn new(key: &str) -> Result<Self, OperatorKeyError> {
        let visible = key.bytes().all(|b| b.is_ascii_graphic());
        if visible && key.len() >= Self::MIN_LEN { Ok(Self(KeyHash::of(key))) } else { Err(OperatorKeyError) }
    }

    /// Whether the presented key is this one.
    #[must_use]
    pub fn matches(&self, presented: &KeyHash) -> bool {
        self.0.matches(presented)
    }
}

/// Who makes a request, once that is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The operator, who may do everything.
    Operator,
    /// A tenant, who may do what is its own.
    Tenant(Name),
}

/// A request that may not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No key, or one that nobody has.
    #[error("a valid key is needed")]
    Unauthenticated,
    /// The path names what the caller cannot see, or nothing.
    #[error("no such resource")]
    NotFound,
    /// The route is the operator's.
    #[error("only the operator may do this")]
    OperatorOnly,
}

impl Caller {
    /// The right to act for a tenant. What the caller may not see does not exist for it.
    ///
    /// # Errors
    /// [`AuthError::NotFound`], whether the tenant does not exist or is another's.
    pub fn tenant(&self, row: Option<Arc<TenantRow>>) -> Result<Tenant, AuthError> {
        match (self, row) {
            (Self::Operator, Some(row)) => Ok(Tenant(row)),
            (Self::Tenant(name), Some(row)) if *name == row.name => Ok(Tenant(row)),
            _ => Err(AuthError::NotFound),
        }
    }

    /// Whether the caller may see what belongs to `tenant`.
    #[must_use]
    pub fn sees(&self, tenant: &Name) -> bool {
        match self {
            Self::Operator => true,
            Self::Tenant(name) => name == tenant,
        }
    }

    /// Passes the operator only.
    ///
    /// # Errors
    /// [`AuthError::OperatorOnly`] for everybody else.
    pub fn operator(&self) -> Result<(), AuthError> {
        if *self == Self::Operator { Ok(()) } else { Err(AuthError::OperatorOnly) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::TenantSettings;

    fn row(name: &str) -> Option<Arc<TenantRow>> {
        let (settings, created_at) = (TenantSettings::default(), Timestamp::UNIX_EPOCH);
        Some(Arc::new(TenantRow { name: name.parse().unwrap(), settings, created_at }))
    }

    #[test]
    fn a_tenant_is_had_by_itself_and_by_the_operator_only() {
        let acme = Caller::Tenant("acme".parse().unwrap());
        assert_eq!(acme.tenant(row("acme")).unwrap().name().as_str(), "acme");
        assert_eq!(acme.tenant(row("acme2")).unwrap_err(), AuthError::NotFound);
        assert_eq!(acme.tenant(None).unwrap_err(), AuthError::NotFound);
        assert!(Caller::Operator.tenant(row("acme")).is_ok());
        assert!(Caller::Operator.tenant(None).is_err());
        assert!(acme.operator().is_err() && Caller::Operator.operator().is_ok());
    }

    #[test]
    fn keys_are_random_and_say_nothing_in_logs() {
        let (a, b) = (Key::generate().unwrap(), Key::generate().unwrap());
        assert!(!a.hash().matches(&b.hash()) && a.hash().matches(&KeyHash::of(a.reveal())));
        assert_eq!(a.reveal().len(), 5 + 43, "256 bits in base64");
        assert!(!format!("{a:?}{:?}", a.hash()).contains(a.reveal()));
    }

    #[test]
    fn any_long_visible_operator_key_is_taken() {
        assert!(OperatorKey::new(&"x".repeat(32)).is_ok());
        for bad in ["x".repeat(31), "ä".repeat(32), format!("{} ", "x".repeat(32)), String::new()] {
            assert!(OperatorKey::new(&bad).is_err(), "{bad:?}");
        }
    }
}

//! The crate's one error type. Every bad input ends here, before anything reaches the GPU.

/// What can go wrong, always with the thing that has to change named in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter is outside the range that the algorithm or its kernels take (spec section 9).
    #[error("{parameter} = {value} is not allowed: it must be {allowed}")]
    Parameter {
        /// The parameter, by its name in the public API.
        parameter: &'static str,
        /// The value that was given.
        value: String,
        /// What would be allowed.
        allowed: String,
    },
    /// Something would not fit the device.
    #[error("{what} needs {needed}, but the device's {limit} is {available}")]
    Limit {
        /// What was asked for.
        what: String,
        /// How much of it.
        needed: u64,
        /// The limit's name in WebGPU.
        limit: &'static str,
        /// The limit's value on this device.
        available: u64,
    },
    /// A tensor was used where its element type, length or role does not fit.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// The tensor's name in the recording.
        tensor: String,
        /// What does not fit.
        problem: String,
    },
    /// A buffer that the caller brought cannot stand for a tensor.
    #[error("the buffer given for tensor `{tensor}`: {problem}")]
    Buffer {
        /// The tensor's name in the recording.
        tensor: String,
        /// What is wrong with the buffer.
        problem: String,
    },
    /// No adapter of the wanted kind was found.
    #[error("no GPU adapter found on backends {backends}; {hint}")]
    NoAdapter {
        /// The backends that were asked.
        backends: String,
        /// How to get one.
        hint: &'static str,
    },
    /// A tier was forced that the adapter does not have.
    #[error("tier {tier} was asked for, but {adapter} has: {available}")]
    Tier {
        /// The tier.
        tier: String,
        /// The adapter's name.
        adapter: String,
        /// The tiers that it has.
        available: String,
    },
    /// A word given for a choice is none of its values.
    #[error("{what} `{value}` is unknown; known are: {known}")]
    Unknown {
        /// The choice.
        what: &'static str,
        /// The word that was given.
        value: String,
        /// The words that are known.
        known: String,
    },
    /// A shader does not compile, or does not agree with its host code.
    #[error("shader {shader}: {message}")]
    Shader {
        /// The shader's path below `shaders/`, with the line where there is one.
        shader: String,
        /// What is wrong.
        message: String,
    },
    /// The device reported an error or was lost.
    #[error("GPU: {0}")]
    Gpu(String),
    /// Training data that cannot be used.
    #[error("data {path}: {problem}")]
    Data {
        /// The path that was given.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn parameter(parameter: &'static str, value: impl ToString, allowed: impl Into<String>) -> Self {
        Self::Parameter { parameter, value: value.to_string(), allowed: allowed.into() }
    }

    pub(crate) fn tensor(tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.into(), problem: problem.into() }
    }
}

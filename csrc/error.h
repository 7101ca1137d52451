#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace blockswap {

// What the caller asked for cannot be done: the text names the thing, the numbers and the way out.
// Becomes blockswap.errors.ConfigError in Python.
class ConfigError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The smallest possible plan does not fit under the cap. Becomes blockswap.errors.CapError.
class CapError : public ConfigError {
 public:
  using ConfigError::ConfigError;
};

// A call into the device's driver failed: the text names the call and the driver's own message.
// Becomes blockswap.errors.DeviceError.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// There is no memory for what was asked for: the text has the numbers and the way out. Becomes
// torch.OutOfMemoryError where PyTorch asked, everywhere else DeviceError.
class OutOfMemory : public DeviceError {
 public:
  using DeviceError::DeviceError;
};

// The stream was destroyed by its owner. Becomes blockswap.errors.DeviceError.
class DeadStream : public DeviceError {
 public:
  using DeviceError::DeviceError;
};

// The engine was used in a way that would give wrong values (two forwards at once, a piece that
// does not exist). Becomes blockswap.errors.UseError.
class UseError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// "1.25 GiB", "64.0 MiB", "512 B": the only place in C++ where bytes become text.
std::string format_bytes(int64_t bytes);

}  // namespace blockswap

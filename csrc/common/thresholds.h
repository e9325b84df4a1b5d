// Numbers that decide how experts are compared: shared by host and device.
#pragma once

namespace robustgate {

constexpr float kImpossible = -1048576.0f;  // nats
constexpr float kFar = 20.0f;               // nats above expert 0, where e^d_k is left
constexpr float kLn2 = 0.693147181f;

// Where every divergence is above kApart nats and every weight above kSmallestWeight, differences
// of sums serve, which err by about 2e-7 nats; elsewhere terms are compared column by column.
constexpr float kApart = 0.03125f;
constexpr float kSmallestWeight = 1e-6f;
constexpr float kTiny = 1.17549435e-38f;             // smallest normal number
constexpr float kSmallestMixture = 7.88860905e-31f;  // 2^-100: no part of it has underflowed

}  // namespace robustgate

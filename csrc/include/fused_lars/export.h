#pragma once

// Marks what can be used from outside of a shared library. Everything else in it is hidden.
#define FUSED_LARS_API __attribute__((visibility("default")))

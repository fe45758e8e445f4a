#pragma once

// Marks what programs can use of the shared library. Everything else in it is hidden.
#define FUSED_LARS_API __attribute__((visibility("default")))

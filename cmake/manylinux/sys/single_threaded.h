// Hides the header of glibc 2.32 from libstdc++, so that the library loads with glibc 2.28. It says what is
// true in a process with torch: there are other threads.

#pragma once

static constexpr char __libc_single_threaded = 0;

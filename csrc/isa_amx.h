// Whether this compiler builds kernels with AMX, which Linux grants to a process on request.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && __GNUC__ >= 11))
#define MEMATTN_HAS_AMX
#endif

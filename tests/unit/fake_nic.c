/* Loaded before the C library of the ethtool program: what that asks of the rules of the device fake0
 * goes to the socket FAKE_NIC, and the answer comes from there: an errno, and the struct if it is 0.
 */
#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int ask(struct ethtool_rxnfc *command)
{
	int nic = atoi(getenv("FAKE_NIC"));
	int error = EIO;
	size_t size = sizeof(*command);
	if (command->cmd == ETHTOOL_GRXCLSRLALL)
		size += command->rule_cnt * sizeof(__u32);
	struct iovec answer[] = {{&error, sizeof(error)}, {command, size}};
	if (send(nic, command, size, 0) == (ssize_t)size && readv(nic, answer, 2) > 0 && error == 0)
		return 0;
	errno = error;
	return -1;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	struct ifreq *device = va_arg(arguments, struct ifreq *);
	va_end(arguments);
	if (request != SIOCETHTOOL || strcmp(device->ifr_name, "fake0"))
		return syscall(SYS_ioctl, fd, request, device);
	struct ethtool_rxnfc *command = (void *)device->ifr_data;
	if (command->cmd >= ETHTOOL_GRXCLSRLCNT && command->cmd <= ETHTOOL_SRXCLSRLINS)
		return ask(command);
	errno = EOPNOTSUPP;
	return -1;
}
